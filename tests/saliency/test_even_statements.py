"""What is pointed at as a whole, where attention moves within it alone: nothing changes, and that is said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from kit.asking import logits, plain_logits
from kit.tiny import make_model, make_prompt

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, patch_model
from hf_steer.attention import say_once

SIZE = (42, 56)
WHOLE = {
    "box": lambda: Saliency.from_boxes((0, 0, *SIZE), SIZE),
    "mask": lambda: Saliency.from_mask(torch.ones(SIZE[::-1])),
    "away": lambda: -1.0 * Saliency.from_boxes((0, 0, *SIZE), SIZE),
}


@pytest.fixture(autouse=True)
def _said_anew():
    say_once.cache_clear()
    yield
    say_once.cache_clear()


def found(said, family="qwen2_vl", **saliency):
    """How far logits move, and what is warned of."""
    inputs = make_prompt(family, [[3, ("image", 4, 3), 4]] if family == "qwen2_vl" else [[9]])
    model = patch_model(make_model(family), AttentionConfig(queries="all", saliency=SaliencyConfig(source=None, **saliency)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = (logits(model, inputs, said) - plain_logits(model, inputs)).abs().max()
        logits(model, inputs, said)
    return float(moved), [str(one.message) for one in caught]


@pytest.mark.parametrize("whole", WHOLE)
def test_a_whole_picture_that_keeps_its_mass_is_said_once_to_change_nothing(whole):
    moved, said = found(WHOLE[whole]())
    assert moved < 1e-5
    assert len(said) == 1
    assert "covers a whole picture" in said[0]
    assert "preserve_mass=False" in said[0]


def test_what_is_proposed_works_and_a_part_is_not_warned_of():
    for moved, said in (
        found(WHOLE["box"](), normalize="maxabs", preserve_mass=False), found(Saliency.from_boxes((0, 0, 9, 9), SIZE))
    ):  # fmt: skip
        assert moved > 1e-3
        assert not said


@pytest.mark.parametrize("normalize", ["zscore", "minmax", "rank"])
def test_equal_scores_of_a_whole_text_that_come_out_as_zeros_are_said_too(normalize):
    moved, said = found(Saliency.from_tokens(torch.ones(1, 9)), "qwen2", normalize=normalize)
    assert moved == 0
    assert len(said) == 1
    assert f"normalize='{normalize}' makes equal scores zero" in said[0]
    assert not found(Saliency.from_tokens(torch.zeros(1, 9)), "qwen2", normalize=normalize)[1]  # nothing is said
