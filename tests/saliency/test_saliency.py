import math

import numpy as np
import pytest
import torch
from kit import eyes_oracle as oracle
from PIL import Image

from hf_steer import Saliency, SaliencyError
from hf_steer.saliency import EyeRecord, attention_received, find_spans, normalize, scores_from_eyes, scores_from_user
from hf_steer.saliency.paint import Boxes, Picture, Points
from hf_steer.values import Layout, Span, TokenScores


def scored(values, group=None):
    values = torch.tensor([values], dtype=torch.float32)
    return TokenScores(values, torch.zeros_like(values).long() if group is None else torch.tensor([group]))


def normalized(values, method, clip=3.0, group=None):
    return normalize(scored(values, group), method, clip).values[0].tolist()


def test_zscore_equals_its_formula_and_is_clipped():
    values = [1.0, 2.0, 4.0, 9.0]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert normalized(values, "zscore") == pytest.approx([(value - mean) / deviation for value in values])
    assert max(normalized(values, "zscore", clip=1.0)) == 1.0


def test_minmax_rank_and_none_equal_their_formulas():
    values = [3.0, 1.0, 3.0, 8.0, 2.0]
    assert normalized(values, "minmax") == pytest.approx([2 / 7, 0, 2 / 7, 1, 1 / 7])
    assert normalized(values, "rank") == pytest.approx([2.5 / 4, 0, 2.5 / 4, 1, 1 / 4])  # the two 3s share places 2 and 3
    assert normalized(values, "none") == values


@pytest.mark.parametrize("method", ["zscore", "minmax", "rank"])
@pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [5.0], [1.0, 1.0 + 1e-7, 1.0], [0.0, 0.0]])
def test_constant_saliency_gives_zeros_and_no_nan(method, values):
    assert normalized(values, method) == [0.0] * len(values)


def test_two_outliers_do_not_take_the_whole_bias():
    values = [1.0 + 0.01 * (index % 7) for index in range(254)] + [60.0, 80.0]
    raw = torch.tensor(normalized(values, "zscore", clip=1e9))
    clipped, ranked = torch.tensor(normalized(values, "zscore")), torch.tensor(normalized(values, "rank"))
    share = [float(scores[-2:].abs().sum() / scores.abs().sum()) for scores in (raw, clipped, ranked)]
    assert share[0] > 0.4 > 0.10 > share[1] > share[2]
    assert share[2] < 0.02


BULKS = {
    "even": lambda count: 1 + 0.01 * (torch.arange(count) % 7),
    "normal": lambda count: 1 + 0.2 * torch.randn(count),
    "exponential": lambda count: torch.empty(count).exponential_(),
    "lognormal": lambda count: torch.randn(count).exp(),
    "heavy-tailed": lambda count: (2 * torch.randn(count)).exp(),
}


@pytest.mark.parametrize("tokens", [196, 256, 576])
@pytest.mark.parametrize("bulk", BULKS)
def test_two_tokens_at_fifty_times_the_others_take_a_tenth_at_most(bulk, tokens):
    """Of the whole bias, and of the part that draws the gaze."""
    others = BULKS[bulk](tokens - 2)
    scores = torch.cat([others, torch.full((2,), 50 * float(others.median()))])
    robust, plain = (normalize(scored(scores.tolist()), "zscore", 3.0, winsorize=how).values[0] for how in (True, False))
    for part in (torch.abs, torch.relu):
        share, before = (float(part(values)[-2:].sum() / part(values).sum()) for values in (robust, plain))
        assert share <= 0.10
    if tokens == 196 and bulk != "heavy-tailed":
        assert before > 0.20  # what a clipped z-score alone gives them of that part
    assert robust.abs().max() <= 3


@pytest.mark.parametrize("tokens", [2, 16, 25, 256])
def test_scores_of_two_values_keep_their_plain_zscore_to_the_last_bit(tokens):
    for ones in range(1, tokens):
        for low, high in ((0.0, 1.0), (0.25, 50.0)):
            values = torch.tensor([high] * ones + [low] * (tokens - ones))
            plain = ((values - values.mean()) / values.std(unbiased=False)).clamp(-3, 3)
            assert torch.equal(normalize(scored(values.tolist()), "zscore", 3.0).values[0], plain)


def test_scores_without_outliers_keep_their_plain_zscore_to_the_last_bit():
    for tokens in (9, 64, 300):
        for values in (torch.rand(tokens), torch.linspace(0, 1, tokens).pow(2), 3 + torch.rand(tokens)):
            plain = ((values - values.mean()) / values.std(unbiased=False)).clamp(-3, 3)
            assert torch.equal(normalize(scored(values.tolist()), "zscore", 3.0).values[0], plain)


def test_winsorizing_equals_its_formula():
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0]
    spread = 1.4826 * 0.2  # deviations from the median 1.4: .4 .3 .2 .1 0 .1 .2 .3 7.6
    pulled = [*values[:-1], 1.4 + 5 * spread]
    mean = sum(pulled) / 9
    deviation = math.sqrt(sum((value - mean) ** 2 for value in pulled) / 9)
    assert normalized(values, "zscore") == pytest.approx([(value - mean) / deviation for value in pulled], rel=1e-5)
    third = [1.0, 1.1, 1.2, 9.0, 9.0, 1.3]  # too many to be outliers
    assert torch.equal(
        normalize(scored(third), "zscore", 3.0).values, normalize(scored(third), "zscore", 3.0, winsorize=False).values
    )


def test_groups_are_normalised_by_themselves_and_silence_stays_zero():
    values, group = [1.0, 3.0, 100.0, 300.0, 7.0], [0, 0, 1, 1, -1]
    assert normalized(values, "minmax", group=group) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("patches", [1, 7, 33])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_attention_received_equals_plain_loops_in_chunks_of_any_size(patches, chunk):
    query, key = torch.randn(2, 3, patches, 5).unbind(0)
    expected = torch.zeros(patches, dtype=torch.float64)
    for head in range(3):
        for q in range(patches):
            logits = [0.4 * float(query[head, q].double() @ key[head, k].double()) for k in range(patches)]
            total = sum(math.exp(logit) for logit in logits)
            for k in range(patches):
                expected[k] += math.exp(logits[k]) / total / 3
    received = attention_received(query, key, 0.4, scores_per_chunk=chunk)
    torch.testing.assert_close(received.double(), expected, rtol=1e-5, atol=1e-6)
    assert received.mean().item() == pytest.approx(1.0)
    weights = torch.rand(patches)
    rows = oracle.attention(query, key, 0.4)
    weighted = [sum(float(weights[q]) * rows[q][k] for q in range(patches)) for k in range(patches)]
    received = attention_received(query, key, 0.4, weights, scores_per_chunk=chunk)
    torch.testing.assert_close(received.double(), torch.tensor(weighted).double(), rtol=1e-5, atol=1e-6)


def test_a_box_scores_the_share_of_each_token_that_it_covers():
    # the picture has 40 x 20 pixels, the grid 4 x 2 tokens of 10 x 10 pixels; the box covers columns 0.5 to 2, rows 0 to 1.5
    saliency = Saliency.from_boxes((5, 0, 20, 15), (40, 20))
    grid = saliency.regions[0].paint.on_grid(2, 4)
    assert grid.tolist() == [[0.5, 1, 0, 0], [0.25, 0.5, 0, 0]]
    both = Saliency.from_boxes([(0, 0, 10, 10), (0, 0, 20, 10)], Image.new("RGB", (40, 20))).regions[0].paint.on_grid(2, 4)
    assert both.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_masks_and_maps_are_averaged_on_coarse_grids_and_interpolated_on_fine_ones():
    mask = np.zeros((4, 6), dtype=bool)
    mask[:2, :3] = True
    assert Saliency.from_mask(mask).regions[0].paint.on_grid(2, 2).tolist() == [[1, 0], [0, 0]]
    assert Saliency.from_mask(mask).regions[0].paint.on_grid(1, 1).tolist() == [[0.25]]
    fine = Saliency.from_map([[0.0, 1.0]]).regions[0].paint.on_grid(2, 4)
    assert fine[0, 0] < fine[0, 1] < fine[0, 2] < fine[0, 3]
    assert Picture(torch.tensor([[2.0, 4.0], [6.0, 8.0]])).on_grid(1, 2).tolist() == [[4, 6]]


def test_points_are_spots_that_never_fall_between_tokens():
    spot = Saliency.from_points((25, 5), (40, 20), radius_px=0.01).regions[0].paint.on_grid(2, 4)
    assert spot.argmax() == 2
    assert spot[0, 2] > 0.8
    wide = Points(((0.5, 0.5),), (0.5, 0.5)).on_grid(3, 3)
    assert wide.argmax() == 4
    assert wide[0, 0] == wide[2, 2] < wide[0, 1] < wide[1, 1]


def test_char_spans_mark_every_token_that_they_touch():
    offsets = [[(0, 0), (0, 3), (3, 7), (7, 9)], [(0, 2), (2, 4), (4, 4), (4, 6)]]
    saliency = Saliency.from_char_spans([[(2, 4)], [(0, 1), (5, 6)]], offsets)
    assert saliency.tokens.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    weighted = Saliency.from_char_spans([[(2, 4)], [(0, 1)]], offsets, weights=[0.5])
    assert weighted.tokens.tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0]]


def laid_out(**grids):
    return {modality: [Layout(grid=grid) for grid in own] for modality, own in grids.items()}


def spans_of(*grids):
    start, spans = 2, []
    for index, grid in enumerate(grids):
        count = math.prod(grid)
        modality, place = ("image", index) if grid[0] == 1 else ("video", 0)
        spans.append(Span(modality, 0, place, torch.arange(start, start + count), Layout(grid=grid)))
        start += count + 1
    return tuple(spans)


def laid(saliency, spans, length=40):
    real = torch.ones(1, length, dtype=torch.bool)
    return scores_from_user(saliency, spans, real=real, first_position=0, temporal_patch_size=2)


def test_regions_land_on_the_tokens_of_the_picture_they_name():
    spans = spans_of((1, 2, 2), (1, 1, 3))
    scores = laid(Saliency.from_mask([[0, 0], [1, 0]]) + Saliency.from_mask([[0, 0, 1]], image=1), spans)
    assert scores.values[0, 2:10].tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert scores.group[0, 2:10].tolist() == [0, 0, 0, 0, -1, 1, 1, 1]
    overlapping = laid(Saliency.from_mask([[1, 0], [0, 0]]) + Saliency.from_mask([[1, 1], [0, 0]]), spans)
    assert overlapping.values[0, 2:6].tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("copies", [1, 3])
def test_pictures_that_were_encoded_once_per_beam_are_read_once(copies):
    """Row by row, all pictures of a row, then all of them again: as transformers repeated pixels up to 5.17."""
    spans = (
        Span("image", 0, 0, torch.tensor([1, 2]), Layout(grid=(1, 1, 2))),
        Span("image", 0, 1, torch.tensor([4]), Layout(grid=(1, 1, 1))),
        Span("image", 1, 0, torch.tensor([0, 1]), Layout(grid=(1, 1, 2))),
    )
    scores = torch.tensor([*[1.0, 2.0, 3.0] * copies, *[4.0, 5.0] * copies])
    laid_out = scores_from_eyes(
        spans, {"image": EyeRecord(scores, torch.arange(len(scores)))}, batch=2, copies=copies, length=5, device=torch.device("cpu")
    )
    assert laid_out.values.tolist() == [[0, 1, 2, 0, 3], [4, 5, 0, 0, 0]]
    with pytest.raises(SaliencyError, match="the prompt holds 5, the vision tower made 4"):
        record = EyeRecord(torch.ones(4), torch.zeros(4).long())
        scores_from_eyes(spans, {"image": record}, batch=2, copies=copies, length=5, device=torch.device("cpu"))


def test_frames_of_a_video_count_sampled_frames():
    spans = spans_of((3, 1, 2))
    scores = laid(Saliency.from_mask([[1, 1]], video=0, frames=(2, 4)), spans)
    assert scores.values[0, 2:8].tolist() == [0, 0, 1, 1, 0, 0]
    partly = laid(Saliency.from_mask([[1, 1]], video=0, frames=(1, 3)), spans)
    assert partly.values[0, 2:8].tolist() == [1, 1, 1, 1, 0, 0]


def test_spans_follow_rows_and_modalities_and_may_be_interrupted():
    ids = torch.tensor([[1, 9, 9, 1, 9, 9, 9, 9, 1], [1, 1, 8, 8, 1, 8, 8, 1, 9]])
    layouts = laid_out(image=[(1, 1, 2), (1, 2, 2), (1, 1, 1)], video=[(2, 1, 2)])
    spans = find_spans(ids, {"image": 9, "video": 8}, layouts, first_position=100)
    found = [(span.row, span.modality, span.index, span.positions.tolist()) for span in spans]
    assert found == [
        (0, "image", 0, [101, 102]), (0, "image", 1, [104, 105, 106, 107]), (1, "image", 0, [108]),
        (1, "video", 0, [102, 103, 105, 106]),
    ]


@pytest.mark.parametrize("grids", [{"image": [(1, 1, 2)]}, {"image": [(1, 1, 4)]}, {"image": [(1, 1, 3), (1, 1, 1)]}, {}])
def test_a_token_count_that_does_not_match_is_an_error_with_both_counts(grids):
    with pytest.raises(SaliencyError, match=r"image token count does not match: .* hold \[3\] image tokens"):
        find_spans(torch.tensor([[9, 9, 9, 1]]), {"image": 9}, laid_out(**grids))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Saliency.from_tokens([[0.0, float("nan")]]), "scores must be finite; 1 values are NaN"),
        (lambda: Saliency.from_tokens([[[1.0]]]), r"\(batch, prompt tokens\); got shape \(1, 1, 1\)"),
        (lambda: Saliency.from_mask([[0, -1]]), r"must lie in \[0, 1\]; got -1 to 0"),
        (lambda: Saliency.from_mask([[0, 2]]), "got 0 to 2.*from_map"),
        (lambda: Saliency.from_mask([0, 1]), r"must have shape \(height, width\); got \(2,\)"),
        (lambda: Saliency.from_map([[0, -1.5]]), "must not be negative; got -1.5.*negative strength"),
        (lambda: Saliency.from_map([[0, float("nan")]]), "map must be finite"),
        (lambda: Saliency.from_boxes((0, 0, 41, 10), (40, 20)), "outside the picture of 40 x 20 pixels"),
        (lambda: Saliency.from_boxes((-1, 0, 5, 10), (40, 20)), "outside the picture"),
        (lambda: Saliency.from_boxes((5, 0, 5, 10), (40, 20)), "is empty or outside"),
        (lambda: Saliency.from_boxes((0, 0, 1), (40, 20)), "a box is"),
        (lambda: Saliency.from_boxes((0, 0, 1, float("nan")), (40, 20)), "must be finite"),
        (lambda: Saliency.from_boxes((0, 0, 1, 1), (0, 20)), "image_size must be"),
        (lambda: Saliency.from_points((41, 3), (40, 20)), r"point \(41, 3\) is outside"),
        (lambda: Saliency.from_points((1, 3), (40, 20), radius_px=0), "radius_px must be above 0"),
        (lambda: Saliency.from_mask([[1]], row=-1), "count from 0; got row=-1"),
        (lambda: Saliency.from_mask([[1]], frames=(0, 2)), "of a video, with video="),
        (lambda: Saliency.from_char_spans([[(0, 3)]], [(0, 3)]), r"shape \(batch, tokens, 2\)"),
        (lambda: Saliency.from_char_spans([[(0, 9)]], [[(0, 3)]]), "row 0: characters 0 to 9 are empty or outside its text of 3"),
        (lambda: Saliency.from_char_spans([[(2, 2)]], [[(0, 3)]]), "are empty"),
        (lambda: Saliency.from_char_spans([[], []], [[(0, 3)]]), "2 rows of spans for 1 rows"),
        (lambda: Saliency.from_tokens([[1.0]]) + Saliency.from_mask([[1]]), "cannot be combined"),
        (lambda: Saliency.from_tokens([[1.0]]) + Saliency.from_tokens([[1.0, 2.0]]), "cannot be combined"),
        (lambda: laid(Saliency.from_mask([[1]], image=2), spans_of((1, 2, 2))), "no image 2 in row 0: .* holds 1 of them"),
        (lambda: laid(Saliency.from_mask([[1]], row=3), spans_of((1, 2, 2))), "no image 0 in row 3"),
        (lambda: laid(Saliency.from_mask([[1]], video=0, frames=(0, 9)), spans_of((3, 1, 2))), "past the video's 6 sampled"),
        (lambda: laid(Saliency.from_tokens([[1.0] * 39]), ()), r"shape \(1, 39\); the prompt needs \(1, 40\)"),
        (lambda: laid(Saliency.from_tokens([[1.0] * 40] * 2), ()), r"shape \(2, 40\); the prompt needs \(1, 40\)"),
    ],
)
def test_malformed_saliency_says_what_is_wrong(build, message):
    with pytest.raises(SaliencyError, match=message):
        build()


def test_box_paint_conserves_area():
    box = Boxes(((0.13, 0.21, 0.77, 0.9),))
    for height, width in ((3, 5), (7, 2), (1, 1), (16, 16)):
        assert box.on_grid(height, width).mean().item() == pytest.approx(0.64 * 0.69, rel=1e-5)
