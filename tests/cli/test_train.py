from __future__ import annotations

from fdl_bidsapp.cli import toolbox

from ..training.conftest import LABELS, write_case


def make_set(folder):
    rows = ["id\tsplit\tqsm\tlabel"]
    for i, split in enumerate(("train", "train", "validation")):
        write_case(folder / f"case{i}", i)
        rows.append(f"case{i}\t{split}\tcase{i}_qsm.nii.gz\tcase{i}_label.nii.gz")
    (folder / "labels.tsv").write_text(LABELS)
    (folder / "cases.tsv").write_text("\n".join(rows) + "\n")
    (folder / "train.toml").write_text(
        'table = "cases.tsv"\nlabels = "labels.tsv"\nmethod = "late"\nfusion_channels = 2\n'
        "grid_shape = [16, 16, 12]\nbackbone_options = {width = 4, levels = 2}\n"
        "recipe_options = {steps = 9, batch = 1}\n"
    )


def test_trains_measures_and_segments(tmp_path, capsys):
    make_set(tmp_path)
    toml, table = str(tmp_path / "train.toml"), str(tmp_path / "cases.tsv")
    models = []
    for name in ("one", "two"):
        models.append(str(tmp_path / f"{name}.safetensors"))
        seed = str(len(models))
        flags = ["--name", name, "--method", "none", "--steps", "2", "--seed", seed]
        assert toolbox.run(["train", toml, "--output", models[-1], "--device", "cpu", *flags]) == 0
    out = tmp_path / "measured"
    options = ["--table", table, "--split", "validation", "--output", str(out), "--device", "cpu"]
    assert toolbox.run(["evaluate", *models, *options]) == 0
    assert "two\tmean of structures\tDice" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "cases.tsv",
        "differences.tsv",
        "summary.tsv",
    ]
    image, segmented = str(tmp_path / "case0_qsm.nii.gz"), str(tmp_path / "segmented")
    arguments = ["segment", image, "--model", models[0], "--output", segmented, "--device", "cpu"]
    assert toolbox.run(arguments) == 0
    assert (tmp_path / "segmented/case0_qsm.nii.gz").exists()


def test_tells_in_one_line_what_is_wrong(tmp_path, capsys):
    make_set(tmp_path)
    toml, model = str(tmp_path / "train.toml"), str(tmp_path / "m.safetensors")
    assert toolbox.run(["train", toml, "--output", str(tmp_path / "m.pt")]) == 64
    assert toolbox.run(["train", toml, "--output", model, "--max-minutes", "0"]) == 64
    assert toolbox.run(["train", "--output", model]) == 64
    assert toolbox.run(["evaluate", model, "--output", str(tmp_path / "out")]) == 66
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 4
    assert all(line.startswith("fdl: ") and "Remedy" in line for line in messages)


def test_runs_an_experiment(tmp_path, capsys):
    make_set(tmp_path)
    config = tmp_path / "grid.toml"
    text = (tmp_path / "train.toml").read_text().replace("steps = 9", "steps = 2")
    grid = '[grid]\nmethod = ["none", "early"]\n[measure]\nsplit = "validation"\n'
    config.write_text(text + grid)
    out = tmp_path / "results"
    assert toolbox.run(["experiment", str(config), "--output", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    names = ("cases.tsv", "results.tsv", "dice.png", "differences.tsv")
    assert printed.out.split() == [str(out / name) for name in names]
    assert "method=early: done" in printed.err
