"""Headers and sidecars at random: an image or one clear error, and never a traceback.

A hundred cases each; ``pytest tests/faults/test_fuzz.py --hypothesis-profile=long --timeout=0``
tries 10,000.
"""

from __future__ import annotations

import gzip
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fdl_bidsapp.bids.inputs import find_scans
from fdl_bidsapp.errors import FdlError
from fdl_bidsapp.imaging.grid import Grid, canvas_geometry, conform, load_image

SIDE = 9
COARSE = Grid((16, 16, 16), (8.0, 8.0, 8.0))
fuzzed = settings(deadline=None, suppress_health_check=list(HealthCheck))


def sound(kind: type[nib.Nifti1Image] = nib.Nifti1Image, dtype: str = "f4") -> bytes:
    """Return a small image that can be read."""
    data = np.arange(SIDE**3).reshape((SIDE,) * 3).astype(dtype)
    image = kind(data, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.set_sform(image.affine, 1)
    return bytes(image.to_bytes())


SOUND = {
    (kind, dtype): sound(kind, dtype)
    for kind in (nib.Nifti1Image, nib.Nifti2Image)
    for dtype in ("f4", "f8", "i2", "u1", "c8")
}

short = st.one_of(st.sampled_from([0, 1, -1, 2, 8, 300, 32767, -32768]), st.integers(-9, 1200))
real = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-30, 1e30, -1e38, float("nan"), float("inf"), 352.0, 2.0**31]),
    st.floats(width=32),
    st.floats(-10, 400, width=32),
)
FIELDS: dict[str, tuple[int, st.SearchStrategy[Any]]] = {
    **{name: (8, short) for name in ("dim",)},
    **{name: (1, short) for name in ("datatype", "bitpix", "qform_code", "sform_code")},
    **{name: (1, real) for name in ("vox_offset", "scl_slope", "scl_inter", "quatern_b")},
    **{name: (1, real) for name in ("quatern_c", "quatern_d", "qoffset_x", "cal_max")},
    **{name: (4, real) for name in ("srow_x", "srow_y", "srow_z")},
    "pixdim": (8, real),
    "xyzt_units": (1, st.integers(0, 255)),
    "sizeof_hdr": (1, st.sampled_from([0, 348, 540, -1, 2**31 - 1])),
    "magic": (1, st.sampled_from([b"n+1", b"ni1", b"n+2", b"", b"nope"])),
}


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Draw an image file with damage of all kinds to its header, its data and its packing."""
    kind, dtype = draw(st.sampled_from(sorted(SOUND, key=str)))
    content = bytearray(SOUND[kind, dtype])
    length = kind.header_class.sizeof_hdr
    header = kind.header_class(bytes(content[:length]))
    values = header.structarr
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4)):
        size, value = FIELDS[name]
        place = draw(st.integers(0, size - 1))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = draw(value)
            if not isinstance(drawn, bytes) and values[name].dtype.kind in "iu":
                limits = np.iinfo(values[name].dtype)
                number = 0 if np.isnan(drawn) else drawn
                drawn = int(min(max(number, int(limits.min)), int(limits.max)))
            if size > 1:
                values[name][place] = drawn
            else:
                values[name] = drawn
    content[:length] = values.tobytes()
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, length + 40), st.integers(0, 255)), max_size=3)
    ):
        content[place] = value
    if draw(st.booleans()):
        extension = struct.pack("<ii", draw(st.integers(-64, 2**31 - 1)), draw(short))
        content[length + 4 : length + 4] = extension
        content[length] = 1
    if draw(st.booleans()):
        content = bytearray(gzip.compress(bytes(content)))
        for place, value in draw(
            st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2)
        ):
            content[min(place, len(content) - 1)] = value
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@fuzzed
@given(images(), st.sampled_from([".nii", ".nii.gz"]))
def test_any_image_file_is_read_or_refused_in_one_line(content: bytes, extension: str) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, f"sub-01_Chimap{extension}")
        path.write_bytes(content)
        refusal = None
        try:
            loaded = load_image(path)
        except FdlError as error:
            refusal = error
        if refusal is not None:
            event(refusal.cause[:30])
            assert str(path) in str(refusal)
            assert refusal.remedy
            assert "\n" not in str(refusal)
            return
        event("read")
        data = np.asarray(loaded.image.dataobj)
        assert data.dtype == np.float32
        assert np.isfinite(data).all()
        shape, affine, _ = canvas_geometry(loaded.image, COARSE)
        assert np.isfinite(conform(loaded.image, shape, affine)).all()


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(10**300, 10**320),
        st.floats(),
        st.floats(0, 0.1),
        st.text(max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
sidecars = st.one_of(
    st.fixed_dictionaries({"EchoTime": values}),
    st.dictionaries(st.sampled_from(["EchoTime", "Units", "MagneticFieldStrength"]), values),
    values,
).map(lambda value: json.dumps(value).encode())
anything = st.one_of(sidecars, sidecars, st.binary(max_size=60))


@fuzzed
@given(st.lists(anything, min_size=3, max_size=3), anything, st.sampled_from(["MEGRE", "T2starw"]))
def test_any_sidecar_is_used_or_named(own: list[bytes], inherited: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        description = {"Name": "fuzz", "BIDSVersion": "1.10.0"}
        (root / "dataset_description.json").write_text(json.dumps(description))
        anat = root / "sub-01" / "anat"
        anat.mkdir(parents=True)
        for number, content in enumerate(own, 1):
            stem = anat / f"sub-01_echo-{number}_part-mag_{suffix}"
            stem.with_suffix(".nii.gz").touch()
            stem.with_suffix(".json").write_bytes(content)
        (root / f"part-mag_{suffix}.json").write_bytes(inherited)
        (scan,) = find_scans(root).scans
        assert scan.error is None
        assert [source.contrast for source in scan.sources][-1] == "imag"
        fitted = scan.get("r2star")
        event("fitted" if fitted else "left out")
        if fitted is None:
            assert any("R2* was not fitted" in note for note in scan.notes)
            assert not any("\n" in note for note in scan.notes)
        else:
            assert list(fitted.echo_times) == sorted(set(fitted.echo_times))
            assert 0 < fitted.echo_times[0] < fitted.echo_times[-1] < 1


@fuzzed
@given(anything)
def test_any_description_is_used_or_refused_in_one_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "dataset_description.json").write_bytes(content)
        (root / "sub-01" / "anat").mkdir(parents=True)
        (root / "sub-01" / "anat" / "sub-01_Chimap.nii.gz").touch()
        told = str(root)
        try:
            assert len(find_scans(root).scans) == 1
        except FdlError as error:
            told = str(error)
        assert str(root) in told
        assert "\n" not in told
