"""What is said of pictures and sounds, on single cells and combined: against plain loops in fp64."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from hf_steer import Saliency, SaliencyError
from hf_steer.evidence import digits, pointing
from hf_steer.saliency import scores_from_user
from hf_steer.saliency.cuts import uncrop
from hf_steer.saliency.paint import Boxes, Picture, Points
from hf_steer.values import Layout, Span

CELLS = [(0.0, 0.0, 0.31, 0.2), (0.31, 0.0, 0.62, 0.2), (0.1, 0.35, 0.2, 0.95), (0.0, 0.0, 1.0, 1.0), (0.62, 0.1, 1.0, 0.97)]
"""Of unequal size and shape, with gaps and overlaps, as OneVision's are."""


def overlap(start, end, other_start, other_end):
    return max(0.0, min(end, other_end) - max(start, other_start))


def share(cell, box):
    """Of a cell's area that a box covers."""
    across, down = overlap(cell[0], cell[2], box[0], box[2]), overlap(cell[1], cell[3], box[1], box[3])
    return across * down / ((cell[2] - cell[0]) * (cell[3] - cell[1]))


def on_cells(paint, cells=CELLS):
    return paint.on_cells(torch.tensor(cells, dtype=torch.float64)).tolist()


def test_a_box_scores_the_share_of_each_cell_that_it_covers():
    boxes = ((0.05, 0.1, 0.4, 0.6), (0.5, 0.0, 0.7, 1.0))
    expected = [max(share(cell, box) for box in boxes) for cell in CELLS]
    assert on_cells(Boxes(boxes)) == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 0


def test_a_map_is_averaged_over_the_area_of_each_cell():
    values = torch.rand(5, 7).round(decimals=2)
    expected = []
    for cell in CELLS:
        total = 0.0
        for row in range(5):
            for column in range(7):
                total += float(values[row, column]) * share(cell, (column / 7, row / 5, (column + 1) / 7, (row + 1) / 5))
        expected.append(total)
    assert on_cells(Picture(values)) == pytest.approx(expected, rel=1e-6)


def test_a_map_leaves_cells_silent_that_it_does_not_touch_and_constant_ones_constant():
    """Exactly: ranks and min-max would make something of a rounding error."""
    values = torch.zeros(301, 403)
    values[100:, 150:] = torch.rand(201, 253) + 0.5
    edges = torch.linspace(0, 1, 28, dtype=torch.float64)
    sides = list(itertools.pairwise(edges))
    cells = torch.tensor([(left, top, right, bottom) for top, bottom in sides for left, right in sides])
    painted = Picture(values).on_cells(cells)
    away = (cells[:, 2] <= 150 / 403) | (cells[:, 3] <= 100 / 301)
    assert (painted[away] == 0).all()
    assert (painted[~away] > 0).all()
    assert Picture(torch.full((301, 403), 0.3)).on_cells(cells).unique().tolist() == [pytest.approx(0.3)]


def test_points_are_spots_around_which_cells_score_by_their_middles():
    points, radii = ((0.15, 0.1), (0.9, 0.9)), (0.05, 0.2)
    expected = []
    for left, top, right, bottom in CELLS:
        radius_x, radius_y = max(radii[0], (right - left) / 2), max(radii[1], (bottom - top) / 2)
        spots = [
            math.exp(-0.5 * (((left + right) / 2 - x) / radius_x) ** 2 - 0.5 * (((top + bottom) / 2 - y) / radius_y) ** 2)
            for x, y in points
        ]
        expected.append(max(spots))
    assert on_cells(Points(points, radii)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("paint", [Boxes(((0.1, 0.2, 0.65, 0.9),)), Picture(torch.rand(8, 12)), Points(((0.3, 0.6),), (0.1, 0.1))])
def test_a_grid_and_its_cells_say_the_same(paint):
    cells = [(column / 6, row / 4, (column + 1) / 6, (row + 1) / 4) for row in range(4) for column in range(6)]
    torch.testing.assert_close(paint.on_grid(4, 6).flatten(), torch.tensor(on_cells(paint, cells)))


def picture_span(index=0, cells=CELLS, **layout):
    """A picture whose last token is a newline."""
    places = torch.tensor([*cells, (math.nan,) * 4], dtype=torch.float64)
    start = 2 + 10 * index
    return Span("image", 0, index, torch.arange(start, start + len(places)), Layout(cells=places, **layout))


def cropped_span(cells):
    """A picture of which the centre square is seen, and a newline."""
    places = torch.tensor([*cells, (math.nan,) * 4], dtype=torch.float64)
    return picture_span(cells=cells, fit=functools.partial(uncrop, places, 20))


def sound_span(tokens=5, seconds=0.22, slack=0.01):
    edges = torch.arange(tokens + 1, dtype=torch.float64) * 0.04
    cells = torch.stack([edges[:-1], edges[1:]], 1)
    return Span("audio", 0, 0, torch.arange(1, tokens + 1), Layout(cells=cells, size=(seconds,), slack=slack))


def laid(saliency, spans, length=30):
    real = torch.ones(1, length, dtype=torch.bool)
    return scores_from_user(saliency, spans, real=real, first_position=0, temporal_patch_size=1)


def test_a_token_without_a_place_says_nothing():
    scores = laid(Saliency.from_mask(np.ones((4, 4))), [picture_span()])
    assert scores.values[0].tolist() == [0, 0, *[1] * 5, 0, *[0] * 22]
    assert scores.group[0].tolist() == [-1, -1, *[0] * 5, -1, *[-1] * 22]


def test_a_cropped_picture_is_cut_as_its_shape_says():
    """Twice as wide as high: the middle half is shown, in two halves."""
    cells = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    span = cropped_span(cells)
    scores = laid(Saliency.from_boxes((15, 0, 25, 20), (40, 20)), [span])  # seen are 10 to 30
    assert scores.values[0, 2:4].tolist() == [0.5, 0.5]
    high = laid(Saliency.from_boxes((0, 0, 10, 60), (20, 60)), [span])  # seen are 20 to 40 of 60
    assert high.values[0, 2:4].tolist() == [1, 0]
    mask = np.zeros((10, 20))
    mask[:, :8] = 1  # of the original, though of half its size
    assert laid(Saliency.from_mask(mask), [span]).values[0, 2:4].tolist() == pytest.approx([0.6, 0])
    assert laid(Saliency.from_mask(mask[:, ::2], image_size=(40, 20)), [span]).values[0, 2:4].tolist() == pytest.approx([0.6, 0])


@pytest.mark.parametrize(
    "said",
    [
        Saliency.from_boxes([(12, 0, 20, 20), (0, 0, 10, 20)], (40, 20)),
        Saliency.from_points([(20, 5), (5, 5)], (40, 20)),
        Saliency.from_mask(np.arange(40)[None].repeat(20, 0) < 10),
    ],
)
def test_what_lies_where_the_processor_cuts_is_refused(said):
    span = cropped_span([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)])
    message = r"image 0 in row 0 lies where no token looks: of its width the model sees 25.0 to 75.0 %, of its height 0.0 to 100.0"
    with pytest.raises(SaliencyError, match=message):
        laid(said, [span])
    assert laid(Saliency.from_mask(np.zeros((20, 40))), [span]).values.abs().sum() == 0  # silence lies nowhere


def test_a_picture_of_another_shape_is_refused():
    span = picture_span(size=(640, 480))
    message = r"was said to have 480 x 640 pixels, a ratio of 0.75; the model's inputs say 1.33. Give image_size="
    with pytest.raises(SaliencyError, match=message):
        laid(Saliency.from_boxes((0, 0, 9, 9), (480, 640)), [span])
    with pytest.raises(SaliencyError, match="was said to have 96 x 96 pixels"):
        laid(Saliency.from_map(np.ones((96, 96))), [span])
    laid(Saliency.from_map(np.ones((96, 96)), image_size=(640, 480)), [span])
    with pytest.raises(SaliencyError, match="ratio of 3; the model's inputs say between 0.846 and 1.18"):
        laid(Saliency.from_boxes((0, 0, 9, 9), (900, 300)), [picture_span(size=(240, 240), slack=20)])


def test_seconds_score_the_share_of_each_token_that_they_cover():
    spans = [(0.03, 0.05), (0.1, 0.19), (0.11, 0.13)]  # the last lies within the one before
    scores = laid(Saliency.from_seconds(spans, duration_seconds=0.215), [sound_span()])
    united = [(0.03, 0.05), (0.1, 0.19)]
    expected = [sum(overlap(0.04 * t, 0.04 * t + 0.04, *span) for span in united) / 0.04 for t in range(5)]
    assert scores.values[0, 1:6].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.group[0].tolist() == [-1, *[0] * 5, *[-1] * 24]
    assert laid(Saliency.from_seconds((0, 0.22)), [sound_span()]).values[0, 1:6].tolist() == pytest.approx([1] * 5)


def test_of_a_padded_sound_only_the_user_knows_the_length():
    padded = sound_span(tokens=25, seconds=1.0, slack=1.0)
    assert laid(Saliency.from_seconds((0.8, 0.9)), [padded]).values.sum() > 0
    with pytest.raises(SaliencyError, match=r"span \(0.8, 0.9\) is empty, negative or outside the sound of 0.5 s"):
        Saliency.from_seconds((0.8, 0.9), duration_seconds=0.5)
    with pytest.raises(SaliencyError, match="duration_seconds=2.5 was said of audio 0 in row 0, but the model hears 1 s"):
        laid(Saliency.from_seconds((0.8, 0.9), duration_seconds=2.5), [padded])
    cut = sound_span(tokens=25, seconds=1.0, slack=math.inf)
    assert laid(Saliency.from_seconds((0.8, 0.9), duration_seconds=2.5), [cut]).values.sum() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Saliency.from_seconds((0.2, 0.1)), r"span \(0.2, 0.1\) is empty, negative or outside"),
        (lambda: Saliency.from_seconds((0.1, 0.1)), "is empty"),
        (lambda: Saliency.from_seconds((-0.1, 0.1)), "negative"),
        (lambda: Saliency.from_seconds((0.1, math.nan)), "must be finite"),
        (lambda: Saliency.from_seconds((0.1, 0.2, 0.3)), r"a span is \(start, end\) in seconds"),
        (lambda: Saliency.from_seconds((0, 1), duration_seconds=0), "duration_seconds must be above 0; got 0"),
        (lambda: Saliency.from_seconds((0, 1), sound=-1), "count from 0; got row=0, sound=-1"),
        (lambda: laid(Saliency.from_seconds([(0, 0.1), (0.2, 0.23)]), [sound_span()]), r"0.23\) reaches past audio 0 .* 0.22 s"),
        (lambda: laid(Saliency.from_seconds((0.2, 0.22)), [sound_span()]), "lies after the last token of audio 0.*ends at 0.2 s"),
        (lambda: laid(Saliency.from_seconds((0, 0.1), duration_seconds=0.5), [sound_span()]), "hears 0.22 s.*check row="),
        (lambda: laid(Saliency.from_seconds((0, 0.1), sound=1), [sound_span()]), "no audio 1 in row 0: .* holds 1 of them"),
        (lambda: laid(Saliency.from_seconds((0, 0.1)), [picture_span()]), "no audio 0 in row 0"),
    ],
)
def test_seconds_that_cannot_be_are_refused(build, message):
    with pytest.raises(SaliencyError, match=message):
        build()


def plain(term, token):
    """An expression, worked out for one token: tuples of operation and parts, or the token scores of one statement."""
    if isinstance(term, list):
        return term[token]
    operation, *parts = term
    if operation == "times":
        return parts[0] * plain(parts[1], token)
    left, right = (plain(part, token) for part in parts)
    return {"sum": left + right, "product": left * right, "least": min(left, right)}[operation]


def grown(choice, leaves, depth):
    """A random expression: the statement, and what it means in plain numbers."""
    if depth == 0 or choice.random() < 0.2:
        return choice.choice(leaves)
    kind = choice.choice(["sum", "product", "least", "times"])
    statement, meaning = grown(choice, leaves, depth - 1)
    if kind == "times":
        weight = choice.choice([0.5, 2, -1.5, np.float32(0.25)])
        return (weight * statement if choice.random() < 0.5 else statement * weight), ("times", float(weight), meaning)
    other, other_meaning = grown(choice, leaves, depth - 1)
    combined = {"sum": lambda: statement + other, "product": lambda: statement * other, "least": lambda: statement & other}[kind]()
    return combined, (kind, meaning, other_meaning)


@pytest.mark.parametrize("of", ["regions", "tokens"])
def test_combined_statements_equal_the_same_worked_out_token_by_token(of):
    choice, span = random.Random(0), picture_span()
    if of == "regions":
        said = [Saliency.from_map(np.random.default_rng(number).random((4, 5))) for number in range(4)]
        leaves = [(one, laid(one, [span]).values[0].tolist()) for one in said]
    else:
        said = [Saliency.from_tokens(torch.randn(30)) for _ in range(4)]
        leaves = [(one, one.tokens[0].tolist()) for one in said]
    for _ in range(60):
        statement, meaning = grown(choice, leaves, 4)
        expected = torch.tensor([[plain(meaning, token) for token in range(30)]])
        torch.testing.assert_close(laid(statement, [span]).values, expected, rtol=1e-4, atol=1e-5)


def test_statements_on_different_pictures_combine_picture_by_picture():
    spans = [picture_span(0), picture_span(1)]
    first, second = Saliency.from_mask(np.eye(3)), Saliency.from_mask(1 - np.eye(3), image=1)
    both = first + second
    for joint in (first * second, first & second):
        scores = laid(joint, spans)
        assert not scores.values.any()
        assert (scores.group == -1).all()
    for combine in (lambda a, b: a * b, lambda a, b: a & b):
        scores = laid(combine(both, 2.0 * first), spans)
        alone = laid(combine(first, 2.0 * first), spans)
        assert torch.equal(scores.values, alone.values)
        assert torch.equal(scores.group, alone.group)
        assert scores.values[0, 2:7].any()
    with pytest.raises(SaliencyError, match="no image 5 in row 0"):  # though it would say nothing
        laid(first & Saliency.from_mask(np.eye(3), image=5), spans)


def test_frames_and_weights_go_together():
    layout = Layout(grid=(2, 1, 1), cells=torch.tensor([[0.0, 0, 1, 1]] * 2 + [[math.nan] * 4], dtype=torch.float64))
    span = Span("video", 0, 0, torch.arange(3), layout)
    said = 0.5 * Saliency.from_mask([[1]], video=0, frames=(1, 2)) + Saliency.from_mask([[1]], video=0)
    assert laid(said, [span]).values[0, :4].tolist() == [1, 1.5, 0, 0]
    with pytest.raises(SaliencyError, match="past the video's 2 sampled frames"):
        laid(Saliency.from_mask([[1]], video=0, frames=(1, 3)), [span])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda a, t: a * t, "cannot be combined"),
        (lambda a, t: t & a, "cannot be combined"),
        (lambda a, t: t * Saliency.from_tokens([1.0]), r"shapes \(1, 3\) and \(1, 1\) cannot be combined"),
        (lambda a, t: a * math.inf, "must be a finite number; got inf"),
        (lambda a, t: math.nan * t, "must be a finite number; got nan"),
    ],
)
def test_statements_that_do_not_combine_are_refused(build, message):
    with pytest.raises(SaliencyError, match=message):
        build(Saliency.from_mask([[1]]), Saliency.from_tokens([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("build", [lambda a: a & 2, lambda a: a + 1, lambda a: a * "2", lambda a: True * a])
def test_only_statements_and_numbers_combine(build):
    with pytest.raises(TypeError):
        build(Saliency.from_mask([[1]]))


def test_many_statements_add_up_without_end():
    """A sum is flat, however many rows a batch has."""
    total = Saliency()
    for _ in range(1200):
        total = total + Saliency.from_mask([[1]])
    assert laid(0.5 * total, [picture_span()]).values[0, 2] == 600


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(pointing.embedded_model_dir())


def prompts(processor, *questions):
    """As users of Qwen2-VL make them: the placeholder in the text is expanded inside the processor."""
    scene = digits.sample_scenes(digits.load_digits("held-out"), 1, seed=0)[0]
    messages = [digits.messages_for(scene.image, question) for question in questions]
    texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in messages]
    return processor(text=texts, images=[scene.image] * len(texts), return_tensors="pt", padding=True, padding_side="left")


def marked(processor, inputs, saliency, row):
    """What the marked tokens of a row read."""
    return processor.tokenizer.decode(inputs["input_ids"][row][saliency.tokens[row] > 0])


@pytest.mark.parametrize("holder", [lambda processor: processor, lambda processor: processor.tokenizer])
def test_substrings_mark_their_tokens_behind_expanded_placeholders(processor, holder):
    inputs = prompts(processor, "Which digit is it?", "Read the digit.")
    said = Saliency.from_text(["Which digit", "digit."], holder(processor), inputs["input_ids"])
    assert said.tokens.shape == inputs["input_ids"].shape
    for row, text in enumerate(("Which digit", "digit.")):
        assert marked(processor, inputs, said, row).strip() == text
        offsets = processor.tokenizer(
            processor.tokenizer.decode(inputs["input_ids"][row]), return_offsets_mapping=True, add_special_tokens=False
        )
        assert offsets["input_ids"] == inputs["input_ids"][row].tolist()
        start = processor.tokenizer.decode(inputs["input_ids"][row]).index(text)
        by_offset = [float(a < start + len(text) and b > start) for a, b in offsets["offset_mapping"]]
        assert said.tokens[row].tolist() == by_offset
    several = Saliency.from_text([["Which", "it?"], []], holder(processor), inputs["input_ids"])
    assert marked(processor, inputs, several, 0).split() == ["Which", "it?"]
    assert not several.tokens[1].any()
    everywhere = Saliency.from_text("digit", holder(processor), inputs["input_ids"])
    assert [marked(processor, inputs, everywhere, row).strip() for row in (0, 1)] == ["digit", "digit"]


def test_a_substring_that_is_not_there_or_there_twice_is_refused(processor):
    inputs = prompts(processor, "Which digit is it?")
    ids = inputs["input_ids"]
    with pytest.raises(SaliencyError, match="row 0: 'elephant' is not in its text, which reads '.*Which digit"):
        Saliency.from_text("elephant", processor, ids)
    with pytest.raises(SaliencyError, match=r"row 0: 'i' is there \d+ times; say which with occurrence="):
        Saliency.from_text("i", processor, ids)
    with pytest.raises(SaliencyError, match="'it' is there 2 times, counted from 0; got occurrence=2"):
        Saliency.from_text("it", processor, ids, occurrence=2)
    places = [Saliency.from_text("it", processor, ids, occurrence=number).tokens[0].nonzero() for number in (0, 1)]
    assert places[0].max() < places[1].min()
    with pytest.raises(SaliencyError, match=r"2 entries of substrings came for input_ids of shape \(1, \d+\).*one entry per row"):
        Saliency.from_text(["Which", "digit"], processor, ids)
    with pytest.raises(SaliencyError, match="'' is not in its text"):
        Saliency.from_text("", processor, ids)


class Bytes:
    """A tokenizer of single bytes, that decodes a character not yet complete to U+FFFD, as byte-level BPE does."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (False, False)
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_is_marked_whole():
    text = "a😀é b"
    ids = list(text.encode())
    said = Saliency.from_text(["😀"], Bytes(), [ids])
    assert said.tokens[0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert Saliency.from_text("é b", Bytes(), ids).tokens[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


class Backwards:
    def decode(self, ids, **kwargs):
        return "".join(chr(97 + number) for number in reversed(ids))


def test_a_tokenizer_that_does_not_decode_token_by_token_is_refused():
    with pytest.raises(SaliencyError, match="does not decode token by token.*from_char_spans"):
        Saliency.from_text("dc", Backwards(), [0, 1, 2, 3])
