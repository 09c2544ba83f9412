"""Masks as people have them: every kind that has one reading is read that way, every other is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_steer import FileError, Saliency, SaliencyError

SHAPE = [[0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
ONES = np.array(SHAPE)
LABELS = np.array([[0, 0, 3, 3, 0, 7], [0, 3, 3, 3, 0, 0], [0, 0, 0, 3, 5, 5], [7, 0, 0, 0, 5, 5]])


def values_of(mask, **arguments):
    (region,) = Saliency.from_mask(mask, **arguments).regions
    assert region.paint.values.dtype == torch.float32
    return region.paint.values.tolist()


def palette(numbers, colours):
    """A picture of mode P."""
    picture = Image.fromarray(np.asarray(numbers, dtype=np.uint8))
    picture.putpalette([value for colour in colours for value in colour])
    assert picture.mode == "P"
    return picture


def with_alpha(alpha, mode="RGBA"):
    picture = Image.effect_noise((6, 4), 90).convert("RGBA")
    picture.putalpha(Image.fromarray(np.asarray(alpha, dtype=np.uint8)))
    return picture.convert(mode)


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (200, 30, 30), (0, 160, 40)
SAME = {
    "bools": ONES.astype(bool),
    "ones as bytes": ONES.astype(np.uint8),
    "255 as bytes": (255 * ONES).astype(np.uint8),
    "255 as whole numbers": (255 * ONES).tolist(),
    "255 in a tensor": torch.tensor(255 * ONES, dtype=torch.uint8),
    "ones in 16 bits": ONES.astype(np.uint16),
    "real numbers": ONES.astype(np.float64),
    "a tensor in half precision": torch.tensor(ONES, dtype=torch.bfloat16),
    "mode 1": Image.fromarray(ONES.astype(bool)),
    "mode L": Image.fromarray((255 * ONES).astype(np.uint8)),
    "mode L of ones": Image.fromarray(ONES.astype(np.uint8)),
    "mode I": Image.fromarray((255 * ONES).astype(np.int32)),
    "mode I;16": Image.fromarray((255 * ONES).astype(np.uint16)),
    "mode F": Image.fromarray(ONES.astype(np.float32)),
    "mode P": palette(ONES, [BLACK, RED]),
    "mode P, second colour 4": palette(4 * ONES, [BLACK, RED, GREEN, WHITE, WHITE]),
    "mode RGBA": with_alpha(255 * ONES),
    "mode LA": with_alpha(255 * ONES, "LA"),
}


@pytest.mark.parametrize("kind", SAME)
def test_every_kind_of_mask_says_the_same(kind):
    assert values_of(SAME[kind]) == [[float(value) for value in row] for row in SHAPE]


@pytest.mark.parametrize("kind", [kind for kind in SAME if kind.startswith("mode") and kind not in ("mode F", "mode I")])
def test_a_path_says_what_its_picture_says(kind, tmp_path):
    for path in (tmp_path / "mask.png", str(tmp_path / "mask.png")):
        SAME[kind].save(path)
        assert values_of(path) == [[float(value) for value in row] for row in SHAPE]


def test_grey_and_half_transparent_masks_are_shares_of_255():
    grey = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    expected = [[pytest.approx(value / 255) for value in row] for row in grey.tolist()]
    assert values_of(Image.fromarray(grey)) == expected
    large = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    large.putalpha(Image.fromarray(grey))
    assert values_of(large) == expected


KINDS = {
    "array": np.asarray,
    "list": lambda own: own.tolist(),
    "tensor": torch.tensor,
    "mode L": lambda own: Image.fromarray(own.astype(np.uint8)),
    "mode P": lambda own: palette(own, [BLACK, RED, GREEN, WHITE] * 2),
    "mode I": lambda own: Image.fromarray(own.astype(np.int32)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [3, (3, 5), [7], np.int64(5), 0])
def test_labels_are_picked_from_a_map_of_them(kind, label):
    wanted = set(np.atleast_1d(label).tolist())
    expected = [[float(value in wanted) for value in row] for row in LABELS.tolist()]
    assert values_of(KINDS[kind](LABELS), label=label) == expected


def test_a_mask_of_another_size_keeps_its_own_resolution_and_says_the_pictures():
    (region,) = Saliency.from_mask(SAME["mode L"], image_size=(600, 400)).regions
    assert region.size == (600, 400)
    assert tuple(region.paint.values.shape) == (4, 6)
    (own,) = Saliency.from_mask(SAME["mode RGBA"]).regions
    assert own.size == (6, 4)


def test_a_statement_keeps_what_a_mask_said_when_its_buffer_is_used_again():
    for mask in (ONES.astype(np.uint8) * 255, ONES.astype(bool), ONES.astype(np.float32)):
        (region,) = Saliency.from_mask(mask).regions
        mask[:] = 0
        assert region.paint.values.tolist() == SHAPE


REFUSED = [
    (np.array([[0, 128, 255]], dtype=np.uint8), r"got 0 to 255, 3 different whole numbers.*label=.*divided by 255"),
    (LABELS, r"got 0 to 7, 4 different whole numbers"),
    (np.array([[1, 2]]), "got 1 to 2"),
    (255.0 * ONES, r"must lie in \[0, 1\]; got 0 to 255.*divided by 255"),
    (Image.new("RGB", (6, 4), RED), r"mode 'RGB' has 3: which of them is meant\?.*convert\('L'\)"),
    (Image.new("CMYK", (6, 4)), "mode 'CMYK' has 4"),
    (Image.fromarray(LABELS.astype(np.uint8)), "mode 'L' is nowhere brighter than 7 of 255"),
    (palette(LABELS, [BLACK, RED, GREEN, WHITE] * 2), "the colours 0, 3, 5, 7 of its palette; which is the mask.*label="),
    (palette(1 + ONES, [BLACK, RED, GREEN]), "the colours 1, 2 of its palette"),
    (palette(ONES, [WHITE, BLACK]), r"colour 0 is brighter than colour 1; which is the mask\? Give label="),
    (palette(np.arange(24).reshape(4, 6), [BLACK] * 24), r"0, 1, 2, .*11, \.\.\. of its palette"),
    (with_alpha(255 * np.ones((4, 6))), "mode 'RGBA' the alpha says where it is, and this one's is 255 everywhere.*convert"),
    (with_alpha(np.zeros((4, 6)), "LA"), "mode 'LA' the alpha .* is 0 everywhere"),
]


@pytest.mark.parametrize(("mask", "message"), REFUSED)
def test_what_can_be_read_in_several_ways_is_refused_with_the_reason(mask, message):
    with pytest.raises(SaliencyError, match=message):
        Saliency.from_mask(mask)


@pytest.mark.parametrize(
    ("mask", "label", "message"),
    [
        (LABELS, 4, "label 4 is not in this mask; it holds 0, 3, 5, 7"),
        (LABELS, (3, 4, 6), "label 4, 6 is not in this mask"),
        (np.arange(40).reshape(5, 8), 99, "it holds 0, 1, .*, 11 and 28 more"),
        (LABELS, (), r"label= is a whole number, or several; got \(\)"),
        (LABELS, True, "label= is a whole number, or several; got True"),
        (LABELS, "dog", "label= is a whole number, or several; got 'dog'"),
        (LABELS, 3.0, "label= is a whole number, or several; got 3.0"),
        (ONES.astype(bool), 1, "picks from a map of labels, which are whole numbers; this mask holds torch.bool"),
        (ONES.astype(float), 1, "this mask holds torch.float64"),
        (with_alpha(255 * ONES), 1, "of a mask of mode 'RGBA' the alpha counts"),
    ],
)
def test_labels_that_cannot_be_picked_are_refused(mask, label, message):
    with pytest.raises(SaliencyError, match=message):
        Saliency.from_mask(mask, label=label)


def test_a_path_without_a_picture_is_an_error_of_files(tmp_path):
    (tmp_path / "words.txt").write_text("no picture")
    for path in (tmp_path / "words.txt", str(tmp_path / "missing.png")):
        with pytest.raises(FileError, match="cannot be read as a picture"):
            Saliency.from_mask(path)
