"""Scribbles on tokens: against sample points counted in plain loops, and areas that are known."""

from __future__ import annotations

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch

from hf_steer import Saliency, SaliencyError
from hf_steer.saliency import scores_from_user
from hf_steer.saliency.cuts import uncrop
from hf_steer.values import Layout, Span

SIZE = (84, 56)
LINES = {
    "slanted": ([(10, 8), (70, 45)], 6),
    "bent back over itself": ([(12, 40), (60, 12), (14, 14), (62, 44)], 5),
    "level and thin": ([(5, 20), (80, 20)], 1),
    "upright and wide": ([(40, 4), (40, 52)], 17),
    "a dot": ([(33, 21)], 11),
    "standing still": ([(20, 20), (20, 20), (44, 33)], 4),
    "at the edge": ([(0, 0), (84, 0), (84, 56)], 6),
    "two that cross": ([[(10, 28), (70, 28)], [(42, 5), (42, 50)]], 8),
}
CELLS = [(0.0, 0.0, 0.31, 0.2), (0.31, 0.0, 0.62, 0.2), (0.1, 0.35, 0.2, 0.95), (0.0, 0.0, 1.0, 1.0), (0.62, 0.1, 1.0, 0.97)]


def distance(x, y, start, end):
    """From a point to a stretch between two points."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = across**2 + down**2
    part = 0.0 if length == 0 else min(1.0, max(0.0, ((x - start[0]) * across + (y - start[1]) * down) / length))
    return math.hypot(x - start[0] - part * across, y - start[1] - part * down)


def share(cell, points, width, samples=48):
    """Of a cell's area: the sample points that are no farther than half a width from a line."""
    lines = points if isinstance(points[0], list) else [points]
    stretches = [pair for line in lines for pair in itertools.pairwise(line if line[1:] else line * 2)]
    left, top, right, bottom = (side * length for side, length in zip(cell, SIZE * 2, strict=True))
    inside = 0
    for row in range(samples):
        for column in range(samples):
            x, y = left + (column + 0.5) / samples * (right - left), top + (row + 0.5) / samples * (bottom - top)
            inside += any(distance(x, y, *stretch) <= width / 2 for stretch in stretches)
    return inside / samples**2


def paint_of(statement):
    (region,) = statement.regions
    return region.paint


@pytest.mark.parametrize("name", LINES)
def test_a_token_scores_the_share_of_its_area_that_the_lines_cover(name):
    points, width = LINES[name]
    paint = paint_of(Saliency.from_scribble(points, width, SIZE))
    grid = paint.on_grid(4, 6)
    expected = [[share((c / 6, r / 4, (c + 1) / 6, (r + 1) / 4), points, width) for c in range(6)] for r in range(4)]
    # half a row of the oracle's sample points at every edge of the line, at most two of them in a cell of 14 pixels
    torch.testing.assert_close(grid, torch.tensor(expected), rtol=0, atol=2 / 48)
    assert (grid - torch.tensor(expected)).abs().mean() < 0.004
    assert grid.max() > 0.05
    assert grid.min() == 0
    cells = paint.on_cells(torch.tensor(CELLS, dtype=torch.float64))
    assert cells.tolist() == pytest.approx([share(cell, points, width, 96) for cell in CELLS], abs=0.01)


@pytest.mark.parametrize("tokens", [(2, 3), (8, 12), (7, 5), (56, 84)])
def test_areas_are_exact_at_every_resolution(tokens):
    area = SIZE[0] * SIZE[1]
    dot = paint_of(Saliency.from_scribble((33, 21), 11, SIZE)).on_grid(*tokens)
    assert dot.double().mean().item() * area == pytest.approx(math.pi * 5.5**2, rel=1e-4)
    line = paint_of(Saliency.from_scribble([(10, 12.5), (58, 26.5)], 3, SIZE)).on_grid(*tokens)
    assert line.double().mean().item() * area == pytest.approx(50 * 3 + math.pi * 1.5**2, rel=1e-4)  # 48, 14, 50


def test_a_level_line_fills_its_rows_to_the_last_digit():
    grid = paint_of(Saliency.from_scribble([(0, 21), (84, 21)], 7, SIZE)).on_grid(4, 6)
    torch.testing.assert_close(grid, torch.tensor([[0.0] * 6, [0.5] * 6, [0.0] * 6, [0.0] * 6]), rtol=0, atol=1e-6)


def test_hundreds_of_points_are_one_line_however_they_are_cut():
    """A hand draws many short stretches; where they overlap nothing counts twice."""
    drawn = random.Random(0)
    ends = [(drawn.uniform(8, 76), drawn.uniform(8, 48)) for _ in range(4)]
    many = []
    for (x, y), (to_x, to_y) in itertools.pairwise(ends):
        many += [(x + (to_x - x) * step / 100, y + (to_y - y) * step / 100) for step in range(101)]
    few, fine = (paint_of(Saliency.from_scribble(points, 5, SIZE)).on_grid(8, 12) for points in (ends, many))
    torch.testing.assert_close(fine, few, rtol=0, atol=1e-3)  # where lines cross within a token


@pytest.mark.parametrize(("unit", "sides"), [("fraction", (1, 1)), ("thousandths", (1000, 1000))])
def test_points_and_width_are_counted_in_the_unit_and_the_width_along_the_longer_side(unit, sides):
    pixels = paint_of(Saliency.from_scribble([(21, 14), (63, 42)], 8.4, SIZE)).on_grid(4, 6)
    points = [(x / SIZE[0] * sides[0], y / SIZE[1] * sides[1]) for x, y in [(21, 14), (63, 42)]]
    said = Saliency.from_scribble(points, 0.1 * sides[0], SIZE, unit=unit)
    torch.testing.assert_close(paint_of(said).on_grid(4, 6), pixels)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_lines_come_as_lists_arrays_and_tensors(kind):
    expected = paint_of(Saliency.from_scribble([(10, 28), (70, 28)], 8, SIZE)).on_grid(4, 6)
    assert torch.equal(paint_of(Saliency.from_scribble(kind([(10, 28), (70, 28)]), 8, SIZE)).on_grid(4, 6), expected)
    both = paint_of(Saliency.from_scribble(kind([[(10, 28), (70, 28)], [(10, 28), (70, 28)]]), 8, SIZE)).on_grid(4, 6)
    torch.testing.assert_close(both, expected)


def test_scribbles_name_their_picture_and_combine():
    layout = Layout(grid=(1, 4, 6), size=SIZE)
    spans = [Span("image", row, index, torch.arange(24) + 30 * index, layout) for row in (0, 1) for index in (0, 1)]
    first, second = Saliency.from_scribble([(10, 8), (70, 45)], 6, SIZE), Saliency.from_scribble([(20, 10)], 9, SIZE)
    there = Saliency.from_scribble([(10, 8), (70, 45)], 6, SIZE, row=1, image=1)
    real = torch.ones(2, 60, dtype=torch.bool)
    scores = scores_from_user(first + 2.0 * second + there, spans, real=real, first_position=0, temporal_patch_size=1).values
    one, other = (paint_of(own).on_grid(4, 6).flatten() for own in (first, second))
    torch.testing.assert_close(scores[0, :24], one + 2 * other)
    torch.testing.assert_close(scores[1, 30:54], one)
    assert not scores[0, 24:].any()
    assert not scores[1, :30].any()


def test_a_line_where_no_token_looks_is_refused():
    cells = torch.tensor([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], dtype=torch.float64)
    layout = Layout(cells=cells, fit=functools.partial(uncrop, cells, 20))  # of 40 x 20 the middle is seen, 10 to 30
    span = Span("image", 0, 0, torch.arange(2), layout)
    real = torch.ones(1, 4, dtype=torch.bool)

    def laid(said):
        return scores_from_user(said, [span], real=real, first_position=0, temporal_patch_size=1).values[0, :2].tolist()

    half_a_dot = pytest.approx(math.pi / 100, rel=1e-4)
    assert laid(Saliency.from_scribble([(2, 10), (20, 10)], 4, (40, 20))) == [pytest.approx(0.2), half_a_dot]
    with pytest.raises(SaliencyError, match="lies where no token looks"):
        laid(Saliency.from_scribble([[(2, 10), (7, 10)], [(15, 10)]], 4, (40, 20)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Saliency.from_scribble([(10, 8), (90, 45)], 6, SIZE), r"point \(90, 45\) is outside the picture of 84 x 56"),
        (lambda: Saliency.from_scribble([(10, 8), (70, 45)], 0, SIZE), "must be above 0 and at most 84.*in pixels; got 0"),
        (lambda: Saliency.from_scribble([(10, 8), (70, 45)], float("nan"), SIZE), "got nan"),
        (lambda: Saliency.from_scribble([(10, 8), (70, 45)], "wide", SIZE), "the width of a line is a number; got 'wide'"),
        (lambda: Saliency.from_scribble([(10, 8), (70, 45)], 0.1, SIZE), '0.1 x 0.1 pixels.*"pixels".*"fraction".*"thousandths"'),
        (lambda: Saliency.from_scribble([(0.1, 0.2), (0.7, 0.4)], 6, SIZE), "within the first pixel.*\"fraction\""),
        (lambda: Saliency.from_scribble([(0.1, 0.2)], 2, SIZE, unit="fraction"), "at most 1, the longer side.*fraction; got 2"),
        (lambda: Saliency.from_scribble([], 6, SIZE), r"a point is \(x, y\); got \[\]"),
        (lambda: Saliency.from_scribble([(1, 2, 3)], 6, SIZE), "a point is"),
        (lambda: Saliency.from_scribble([[(1, 2)], [(1, float("nan"))]], 6, SIZE), "all must be finite"),
    ],
)
def test_scribbles_that_cannot_be_are_refused(build, message):
    with pytest.raises(SaliencyError, match=message):
        build()
