from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from fdl_bidsapp.errors import ImageError, InputMissingError, UsageError
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.anatomy import sample, transform
from fdl_bidsapp.simulation.labelmaps import find_label_maps, head_map, read_head_map

from ..made_up_heads import PLACES, TABLE, made_up_labels


@pytest.fixture
def folder(tmp_path):
    labels, affine = made_up_labels()
    rows = [f"{index}\t{name}\t{side}" for index, (name, side) in TABLE.items()]
    (tmp_path / "dseg.tsv").write_text("\n".join(["index\tname\themisphere", *rows]) + "\n")
    nib.Nifti1Image(labels, affine).to_filename(tmp_path / "sub-1_dseg.nii.gz")
    return tmp_path


def test_nuclei_keep_place_volume_and_side(made_up_head):
    labels, _ = made_up_labels()
    for nucleus, label in zip(made_up_head.nuclei, nuclei(), strict=True):
        assert nucleus.label == label
        x, y, z = PLACES[label.structure][0]
        side = -1 if label.hemisphere == "L" else 1
        np.testing.assert_allclose(nucleus.centre, (side * x, y, z), atol=0.8)
        volume = np.count_nonzero(labels == 60 + label.index) * 1.5**3
        assert (nucleus.depth > 0).sum() * 0.5**3 == pytest.approx(volume, rel=0.03)


def test_depth_of_a_nucleus_is_the_distance_from_its_surface(made_up_head):
    labels, affine = made_up_labels()
    nucleus = made_up_head.nuclei[0]
    inside = labels == 61
    distance = distance_transform_edt(inside, sampling=1.5)
    deepest = np.unravel_index(distance.argmax(), distance.shape)
    place = affine[:3, :3] @ deepest + affine[:3, 3] - nucleus.centre
    point = transform(nucleus.to_voxel, _tensor(place))
    # The distance is to the next voxel's centre, which lies half a voxel beyond the surface.
    assert float(sample(nucleus.depth, point)) == pytest.approx(distance.max() - 0.75, abs=0.7)


def _tensor(place):
    import torch

    return torch.tensor(place, dtype=torch.float32).reshape(3, 1)


def test_nuclei_are_filled_with_their_surroundings(made_up_head):
    tissues = [made_up_head.tissues[i] for i in np.unique(made_up_head.tissue.numpy())]
    assert not {label.structure for label in nuclei()} & set(tissues)
    assert {"air", "skull", "csf", "white_matter", "choroid_plexus"} <= set(tissues)


def test_the_brain_is_closed_and_centred(made_up_head):
    np.testing.assert_allclose(made_up_head.brain_centre, 0, atol=3)
    np.testing.assert_allclose(made_up_head.brain_size, (112, 136, 112), atol=9)
    middle = transform(made_up_head.depth_to_voxel, _tensor([0.0, 0.0, 0.0]))
    assert float(sample(made_up_head.brain_depth, middle)) == pytest.approx(56, abs=4)


def test_a_file_gives_the_same_head_however_it_is_stored(folder, made_up_head):
    path = find_label_maps(folder)[0]
    turned = nib.load(path).as_reoriented(nib.orientations.axcodes2ornt("LPS"))
    turned.to_filename(path)
    head = read_head_map(path)
    assert head.name == "sub-1_dseg"
    np.testing.assert_array_equal(head.tissue, made_up_head.tissue)
    for one, other in zip(head.nuclei, made_up_head.nuclei, strict=True):
        np.testing.assert_allclose(one.centre, other.centre, atol=1e-4)


def test_what_is_missing_is_told(folder, tmp_path):
    with pytest.raises(InputMissingError, match="no such folder"):
        find_label_maps(tmp_path / "nowhere")
    with pytest.raises(InputMissingError, match="no such file"):
        read_head_map(folder / "sub-9_dseg.nii.gz")
    (folder / "sub-1_dseg.nii.gz").write_bytes(b"no image")
    with pytest.raises(ImageError, match="cannot be read"):
        read_head_map(folder / "sub-1_dseg.nii.gz")
    (folder / "dseg.tsv").write_text("index\tname\n1\tair\n")
    with pytest.raises(ImageError, match="hemisphere"):
        read_head_map(_good(folder))
    (folder / "dseg.tsv").unlink()
    with pytest.raises(InputMissingError, match=r"dseg\.tsv"):
        find_label_maps(folder)


def _good(folder):
    labels, affine = made_up_labels()
    nib.Nifti1Image(labels, affine).to_filename(folder / "sub-1_dseg.nii.gz")
    return folder / "sub-1_dseg.nii.gz"


def test_maps_that_cannot_serve_are_refused():
    labels, affine = made_up_labels()
    with pytest.raises(ImageError, match="no red nucleus left"):
        head_map("x", np.where(labels == 61, 5, labels), affine, TABLE)
    with pytest.raises(ImageError, match="99"):
        head_map("x", np.where(labels == 61, 99, labels), affine, TABLE)
    with pytest.raises(UsageError, match="liver"):
        head_map("x", labels, affine, {**TABLE, 70: ("liver", "M")})
