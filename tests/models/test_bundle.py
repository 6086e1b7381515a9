"""Model files: what is written is what is read, and a wrong file is refused by name and reason."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.errors import FdlError, InputMissingError, ModelError, OutputError, StorageError
from fdl_bidsapp.imaging.confidence import INTERCEPT, SIGNS, Calibration
from fdl_bidsapp.labels import Label, by_abbreviation, nuclei
from fdl_bidsapp.models import bundle
from fdl_bidsapp.models.bundle import load_bundle, save_bundle, shipped_models
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.models.fourier import low_part

SPEC = ModelSpec(
    "test",
    method="multimodal",
    backbone_options={"width": 2, "levels": 2},
    theta=0.2,
    grid_shape=(12, 14, 10),
    grid_spacing=(1.0, 1.5, 2.0),
    contrasts=("qsm", "imag"),
    intensity={"qsm": "robust", "imag": "minmax", "swi": "minmax"},
    labels=nuclei()[:2],
    provenance={"epochs": 3, "seeds": [1, 2], "note": "µ", "dice": {"RNL": 0.5}},
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    image = torch.rand(1, 1, *SPEC.grid_shape)
    bank = {"imag": [low_part(image, SPEC.theta), low_part(image.square(), SPEC.theta)]}
    save_bundle(path, build_network(SPEC), SPEC, bank)
    return path


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read tensors and description, to write them again altered."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return safetensors.torch.load(data), json.loads(header["__metadata__"]["fdl_bidsapp"])


def rewrite(path: Path, tensors: dict, content: dict, *, seal: bool = True) -> None:
    """Write tensors and description; sealed, the digest is right and only the content is wrong."""
    content = {key: value for key, value in content.items() if key != "sha256" or not seal}
    if seal:
        content["sha256"] = bundle._digest(tensors, content)
    safetensors.torch.save_file(tensors, path, {"fdl_bidsapp": json.dumps(content)})


def refusal(path: Path, error: type[FdlError] = ModelError) -> str:
    with pytest.raises(error) as caught:
        load_bundle(path)
    message = str(caught.value)
    assert str(path) in message
    assert caught.value.remedy
    assert "\n" not in message
    return message


def test_what_is_loaded_is_what_was_saved(tmp_path):
    network = build_network(SPEC).eval()
    image = torch.rand(1, 1, *SPEC.grid_shape)
    lows = [low_part(image * k, SPEC.theta) for k in range(12)]
    path = tmp_path / "model.safetensors"

    digest = save_bundle(path, network, SPEC, {"imag": lows})
    loaded = load_bundle(str(path))

    assert loaded.spec == SPEC
    assert loaded.sha256 == digest
    assert loaded.path == path
    assert list(loaded.bank) == ["imag"]
    for low, expected in zip(loaded.bank["imag"], lows, strict=True):
        torch.testing.assert_close(low, expected[0, 0], atol=0, rtol=0)
    rebuilt = loaded.network()
    assert not rebuilt.training
    for own, expected in zip(rebuilt(image, lows[:1]), network(image, lows[:1]), strict=True):
        torch.testing.assert_close(own, expected, atol=0, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_half_precision_halves_the_file_and_hardly_changes_the_output(tmp_path, model):
    network = load_bundle(model).network()
    half = tmp_path / "half.safetensors"
    save_bundle(half, network, SPEC, dtype="float16")
    loaded = load_bundle(half)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state.values())
    image = torch.rand(1, 1, *SPEC.grid_shape)
    torch.testing.assert_close(loaded.network()(image)[0], network(image)[0], atol=0.02, rtol=0)
    stored = [tensor.nbytes for tensor in parts(half)[0].values()]
    assert 2 * sum(stored) == sum(tensor.nbytes for tensor in loaded.state.values())


def test_digest_is_the_content_s_alone(tmp_path, model):
    network = load_bundle(model).network()
    one = save_bundle(tmp_path / "a.safetensors", network, SPEC)
    assert save_bundle(tmp_path / "b.safetensors", network, SPEC) == one
    other = dataclasses.replace(SPEC, provenance={"epochs": 4})
    assert save_bundle(tmp_path / "c.safetensors", network, other) != one


def test_shipped_models_go_by_name(monkeypatch, model):
    monkeypatch.setattr(bundle, "shipped_models", lambda: {"default": model})
    assert load_bundle("default").path == model
    assert all(path.is_file() for path in shipped_models().values())


def test_a_model_that_is_not_there(tmp_path):
    assert "no such model" in refusal(tmp_path / "none.safetensors", InputMissingError)


def test_a_folder_is_refused(tmp_path):
    assert "folder" in refusal(tmp_path)


def test_an_unreadable_file_is_a_storage_error(monkeypatch, model):
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(model, StorageError)


@pytest.mark.parametrize("kind", ["pickle", "zip", "text", "empty", "short"])
def test_another_kind_of_file_is_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    state = build_network(SPEC).state_dict()
    if kind == "zip":
        torch.save(state, path)
    else:
        content = {"pickle": pickle.dumps({"w": 1}), "text": b"not a model\n" * 9, "short": b"\1"}
        path.write_bytes(content.get(kind, b""))
    assert "not a safetensors file" in refusal(path)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "exploded",)

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    refusal(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(model, kept):
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * kept)])
    assert "cut short" in refusal(model)


def test_a_huge_header_length_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in (2**63, 2**40, 2**20 + 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        assert "not a safetensors file" in refusal(path)


@pytest.mark.parametrize("header", [b"{not json", b"[" * 100_000, b"\xff\xfe\xfd\xfc", b'{"a":1'])
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged" in refusal(path)


def test_somebody_else_s_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.rand(3)}, path)
    assert "no description" in refusal(path)
    safetensors.torch.save_file({"weight": torch.rand(3)}, path, {"format": "pt"})
    assert "no description" in refusal(path)


def test_one_flipped_bit_in_a_tensor_is_found(model):
    data = bytearray(model.read_bytes())
    data[-3] ^= 1
    model.write_bytes(data)
    assert "SHA-256" in refusal(model)


@pytest.mark.parametrize(
    ("key", "value"), [("app_version", "9.9"), ("sha256", "0" * 64), ("sha256", None)]
)
def test_altered_metadata_are_found(model, key, value):
    tensors, content = parts(model)
    rewrite(model, tensors, {**content, key: value}, seal=False)
    assert "SHA-256" in refusal(model)


def test_an_altered_specification_is_found(model):
    tensors, content = parts(model)
    content["spec"]["labels"].reverse()
    rewrite(model, tensors, content, seal=False)
    assert "SHA-256" in refusal(model)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_refused(model, version):
    tensors, content = parts(model)
    rewrite(model, tensors, {**content, "format_version": version})
    assert "format" in refusal(model)


@pytest.mark.parametrize("text", ["", "[1]", "null", "{}", '{"format_version": 1}', "[" * 50_000])
def test_an_incomplete_description_is_refused(model, text):
    safetensors.torch.save_file(parts(model)[0], model, {"fdl_bidsapp": text})
    refusal(model)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(ModelSpec)])
def test_every_setting_has_to_be_there_and_of_its_type(model, key):
    tensors, content = parts(model)
    spec = content["spec"]
    for wrong in (None, [], {}, "", -1, 1e300, True, ["x"] * 3, [[1]] * 3, {"x": []}):
        if key == "provenance" and isinstance(wrong, dict):
            continue
        unset = (
            ("features", {}),
            ("locator", None),
            ("calibration", None),
            ("regions", []),
            ("flips", True),
        )
        if (key, wrong) in unset:
            continue
        altered = {**spec, key: wrong}
        rewrite(model, tensors, {**content, "spec": altered})
        refusal(model)
    rewrite(model, tensors, {**content, "spec": {k: v for k, v in spec.items() if k != key}})
    if key in ("features", "locator", "calibration", "regions", "flips"):
        # Files from before there were such things are read as what they are.
        assert not getattr(load_bundle(model).spec, key)
    else:
        assert key in refusal(model)


@pytest.mark.parametrize(
    "change",
    [
        {"grid_shape": [10**6, 10**6, 10**6]},
        {"backbone_options": {"width": 10**6}},
        {"backbone_options": {"levels": 60}},
        {"backbone_options": {"width": 256, "max_width": 1024}, "grid_shape": [300, 300, 300]},
        {"backbone": "pickle"},
        {"unknown": 1},
    ],
)
def test_an_absurd_model_is_refused_before_memory_is_taken(model, change):
    tensors, content = parts(model)
    rewrite(model, tensors, {**content, "spec": {**content["spec"], **change}})
    refusal(model)


def test_tensors_that_do_not_fit_are_named(model):
    tensors, content = parts(model)
    name = "network.conv_h.0.weight"
    for altered in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, name: torch.rand(3, 1, 3, 3, 3)},
    ):
        rewrite(model, altered, content)
        assert name in refusal(model)
    for extra in ("network.more", "bank.t1w.0", "bank.imag.x", "bank.imag.2"):
        rewrite(model, {**tensors, extra: torch.rand(3, 3, 4)}, content)
        assert extra in refusal(model)


def test_weights_that_are_not_finite_are_refused(tmp_path, model):
    network = load_bundle(model).network()
    next(network.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        save_bundle(tmp_path / "nan.safetensors", network, SPEC)
    assert not (tmp_path / "nan.safetensors").exists()


def test_saving_refuses_what_could_not_be_loaded(tmp_path):
    path = tmp_path / "model.safetensors"
    network = build_network(SPEC)
    other = dataclasses.replace(SPEC, method="none")
    with pytest.raises(ModelError, match="do not fit"):
        save_bundle(path, network, other)
    with pytest.raises(ModelError, match="do not fit"):
        save_bundle(path, network, SPEC, {"imag": [torch.rand(5, 5, 5)]})
    with pytest.raises(ModelError, match="JSON"):
        save_bundle(path, network, dataclasses.replace(SPEC, provenance={"x": object()}))
    with pytest.raises(ModelError, match="too long"):
        save_bundle(path, network, dataclasses.replace(SPEC, provenance={"x": "y" * 2**21}))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_older_model(monkeypatch, model):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    before = model.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        save_bundle(model, build_network(SPEC), SPEC)
    assert model.read_bytes() == before
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_locator_comes_back_with_its_weights(tmp_path):
    region = (Label(1, "Region", "REGION", "region", "n/a", None, "#ffffff"),)
    options = {"width": 4, "levels": 2}
    coarse = ModelSpec("coarse", method="none", backbone_options=options, labels=region)
    spec = ModelSpec("located", backbone_options=options, grid_shape=(16, 16, 16), locator=coarse)
    network = build_network(spec)
    save_bundle(tmp_path / "located.safetensors", network, spec)
    bundle = load_bundle(tmp_path / "located.safetensors")
    assert bundle.spec == spec
    again = bundle.network()
    assert again.locator is not None
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "late"},
        {"labels": by_abbreviation(["RNL", "RNR"])},
        {"contrasts": ("imag",)},
    ],
)
def test_a_locator_that_cannot_serve_is_refused(changes):
    settings = {"method": "none", "labels": by_abbreviation(["RNL"]), **changes}
    with pytest.raises(ModelError, match="locator"):
        ModelSpec("located", locator=ModelSpec("coarse", **settings))


def test_regions_come_back(tmp_path):
    labels = by_abbreviation(["RNL", "RNR"])
    options = {"width": 4, "levels": 2}
    coarse = ModelSpec("coarse", method="none", backbone_options=options, labels=labels)
    spec = ModelSpec(
        "located",
        backbone_options=options,
        grid_shape=(16, 16, 16),
        labels=by_abbreviation(["RNL", "DNL", "DNR"]),
        locator=coarse,
        regions=(("RNL",), ("DNL", "DNR")),
    )
    save_bundle(tmp_path / "located.safetensors", build_network(spec), spec)
    again = load_bundle(tmp_path / "located.safetensors").spec
    assert again == spec
    assert again.windows == ((0,), (1, 2))


@pytest.mark.parametrize(
    "regions", [(("RNL",), ()), (("RNL",), ("RNL", "RNR")), (("RNL", "RNR"),), (("RNL",), ("SNL",))]
)
def test_regions_that_are_no_division_of_the_structures_are_refused(regions):
    labels = by_abbreviation(["RNL", "RNR"])
    coarse = ModelSpec("coarse", method="none", labels=labels)
    with pytest.raises(ModelError, match=r"regions|locator"):
        ModelSpec("located", labels=labels, locator=coarse, regions=regions)
    with pytest.raises(ModelError, match="regions"):
        ModelSpec("located", labels=labels, regions=(("RNL",), ("RNR",)))


WEIGHTS = {INTERCEPT: 0.3, **{name: 0.5 * sign for name, sign in SIGNS.items()}}
CALIBRATED = dataclasses.replace(
    SPEC, calibration=Calibration({"qsm": {"red_nucleus": WEIGHTS}}, threshold=0.74)
)


def test_a_calibration_comes_back(tmp_path):
    path = tmp_path / "calibrated.safetensors"
    save_bundle(path, build_network(CALIBRATED), CALIBRATED)
    assert load_bundle(path).spec == CALIBRATED


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [("threshold", value) for value in (0, 1, -0.2, 1e9, "0.7", None, True, float("nan"), 10**400)]
    + [
        ("weights", value)
        for value in (
            {},
            [],
            None,
            {"t1w": {"red_nucleus": WEIGHTS}},
            {"swi": {"red_nucleus": WEIGHTS}},
            {"qsm": {}},
            {"qsm": None},
            {"qsm": {"thalamus": WEIGHTS}},
            {"qsm": {"red_nucleus": []}},
            {"qsm": {"red_nucleus": {}}},
            {"qsm": {"red_nucleus": {**WEIGHTS, "more": 1.0}}},
            *(
                {"qsm": {"red_nucleus": {**WEIGHTS, "soft_dice": weight}}}
                for weight in ("1", None, True, [1.0], -0.5, float("nan"), float("inf"), 1e5)
            ),
        )
    ]
    + [("more", 1)],
)
def test_a_calibration_that_makes_no_sense_is_refused(tmp_path, setting, wrong):
    path = tmp_path / "calibrated.safetensors"
    save_bundle(path, build_network(CALIBRATED), CALIBRATED)
    tensors, content = parts(path)
    content["spec"]["calibration"][setting] = wrong
    rewrite(path, tensors, content)
    refusal(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["weights", "threshold", "qsm", "red_nucleus", INTERCEPT, *SIGNS]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON.filter(lambda value: value is not None))
def test_no_calibration_of_any_kind_gets_through_as_another_error(value):
    spec = json.loads(json.dumps(dataclasses.asdict(CALIBRATED)))
    content = {"spec": {**spec, "calibration": value}}
    with pytest.raises(ModelError, match=r"calibration|specification"):
        bundle._rebuilt(bundle._spec_from_json, content, Path("model.safetensors"))
