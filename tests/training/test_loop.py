from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from fdl_bidsapp.errors import DataError, StorageError
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.training.loop import RecordedNetwork, Schedule, drawing_processes, train

CPU = torch.device("cpu")


class Scale(nn.Module):
    """Logits that grow with the image, by one learnt factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, image, others=()):
        return [torch.cat([-image, image], 1) * self.factor]


def draw(step, progress):
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(1, 1, 3, 3, 3, generator=generator)
    return image, (image[:, 0] > 0).long()


def loss(outputs, classes):
    return torch.stack([nn.functional.cross_entropy(logits, classes) for logits in outputs]).sum()


def test_learns_and_logs(tmp_path):
    trained = train(Scale(), draw, loss, Schedule(100, learning_rate=0.1), tmp_path, CPU)
    assert trained.network.factor.item() > 1
    assert trained.steps == 100
    rows = [line.split("\t") for line in (tmp_path / "log.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "25", "50", "75", "100"]
    assert float(rows[-1][3]) < float(rows[1][3])


def test_a_training_cut_off_gives_what_an_unbroken_one_gives(tmp_path):
    schedule = Schedule(60, learning_rate=0.05, checkpoint_minutes=0)
    whole = train(Scale(), draw, loss, schedule, tmp_path / "whole", CPU)

    def failing(step, progress):
        if step == 37:
            raise KeyboardInterrupt
        return draw(step, progress)

    with pytest.raises(KeyboardInterrupt):
        train(Scale(), failing, loss, schedule, tmp_path / "cut", CPU)
    resumed = train(Scale(), draw, loss, schedule, tmp_path / "cut", CPU)
    assert torch.equal(resumed.network.factor, whole.network.factor)
    steps = [line.split("\t")[0] for line in (tmp_path / "cut/log.tsv").read_text().splitlines()]
    assert steps == ["step", "25", "50"]


def test_rows_after_the_checkpoint_are_written_once(tmp_path):
    schedule = Schedule(50, checkpoint_minutes=100)

    def failing(step, progress):
        if step == 40:
            raise KeyboardInterrupt
        return draw(step, progress)

    with pytest.raises(KeyboardInterrupt):
        train(Scale(), failing, loss, schedule, tmp_path, CPU)
    train(Scale(), draw, loss, schedule, tmp_path, CPU)
    steps = [line.split("\t")[0] for line in (tmp_path / "log.tsv").read_text().splitlines()]
    assert steps == ["step", "25", "50"]


def test_refuses_the_checkpoint_of_another_configuration(tmp_path):
    train(Scale(), draw, loss, Schedule(2), tmp_path, CPU, configuration={"seed": 1, "n": (4,)})
    train(Scale(), draw, loss, Schedule(2), tmp_path, CPU, configuration={"seed": 1, "n": (4,)})
    with pytest.raises(DataError, match="seed was 1 and is now 2"):
        train(Scale(), draw, loss, Schedule(2), tmp_path, CPU, configuration={"seed": 2, "n": [4]})
    with pytest.raises(DataError, match="another network"):
        train(
            nn.Conv3d(1, 1, 1),
            draw,
            loss,
            Schedule(2),
            tmp_path,
            CPU,
            configuration={"seed": 1, "n": [4]},
        )


def test_refuses_a_damaged_checkpoint(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="damaged"):
        train(Scale(), draw, loss, Schedule(2), tmp_path, CPU)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    train(Scale(), draw, loss, Schedule(2), tmp_path, CPU)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        train(Scale(), draw, loss, Schedule(4), tmp_path, CPU)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.tsv"]


def test_gives_the_weights_of_the_best_validation(tmp_path):
    scores = iter([0.2, 0.9, 0.5, 0.4])
    seen = []

    def validate(network):
        seen.append(network.factor.item())
        return next(scores)

    schedule = Schedule(8, learning_rate=0.1, validate_every=2, keep_best=True)
    trained = train(Scale(), draw, loss, schedule, tmp_path, CPU, validate=validate)
    assert (trained.step, trained.steps, trained.validation_dice) == (4, 8, 0.9)
    assert trained.network.factor.item() == seen[1] != seen[-1]


def test_without_averaging_the_result_are_the_last_weights(tmp_path):
    network = Scale()
    trained = train(network, draw, loss, Schedule(5, average=0.0), tmp_path, CPU)
    assert torch.equal(trained.network.factor, network.factor)


def test_a_time_budget_ends_with_the_rate_at_zero(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: 0.5 * next(clock))
    schedule = Schedule(10**6, learning_rate=0.1, max_minutes=2)
    trained = train(Scale(), draw, loss, schedule, tmp_path, CPU)
    assert 50 < trained.steps < 250
    last = (tmp_path / "log.tsv").read_text().splitlines()[-1].split("\t")
    assert float(last[2]) < 0.02


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    def broken(outputs, classes):
        return loss(outputs, classes) * float("nan")

    with pytest.raises(DataError, match="no longer finite"):
        train(Scale(), draw, broken, Schedule(30), tmp_path, CPU)


def test_batches_drawn_in_processes_are_those_drawn_in_a_thread(tmp_path):
    def trained(processes):
        folder = tmp_path / str(processes)
        schedule = Schedule(40, learning_rate=0.05)
        return train(Scale(), draw, loss, schedule, folder, CPU, processes=processes).network

    assert torch.equal(trained(2).factor, trained(0).factor)


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_know_how_far_the_training_is(tmp_path, processes):
    seen = []

    def telling(step, progress):
        image, classes = draw(step, progress)
        return image, torch.full_like(classes, round(1000 * progress))

    def noting(outputs, told):
        seen.append(int(told.max()))
        return outputs[0].square().mean()

    train(Scale(), telling, noting, Schedule(50), tmp_path, CPU, processes=processes)
    assert seen[0] == 0
    assert seen == sorted(seen)
    # Drawn ahead, they know of what was trained then.
    assert 800 <= seen[-1] <= 980


def test_what_a_processor_draws_is_drawn_in_processes_for_a_gpu_alone():
    assert drawing_processes(CPU) == 0
    assert drawing_processes(torch.device("cuda")) >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["none", "early", "late"])
def test_a_recorded_network_gives_what_the_network_gives(method):
    options = {"width": 8, "levels": 3}
    spec = ModelSpec("x", method=method, backbone_options=options, grid_shape=(32, 32, 24))
    network = build_network(spec).cuda().train()
    twin = copy.deepcopy(network)
    recorded = RecordedNetwork(twin)
    for shape in ((1, 1, 32, 32, 24), (1, 1, 32, 32, 24), (2, 1, 24, 24, 24)):
        image = torch.rand(shape, device="cuda")
        found = []
        for run, weights in ((network, network), (recorded, twin)):
            weights.zero_grad(set_to_none=True)
            (logits,) = run(image, [])
            logits.square().mean().backward()
            found.append([logits.detach(), *(each.grad for each in weights.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_training_on_a_gpu_learns(tmp_path):
    device = torch.device("cuda")
    schedule = Schedule(100, learning_rate=0.1)
    trained = train(Scale(), draw, loss, schedule, tmp_path, device, processes=2, record=True)
    assert trained.network.factor.item() > 1
