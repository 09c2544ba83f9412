"""Two generations are compared as far as both said the same, however many tokens each has."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from hf_steer.testing.generation import while_alike


def said(*tokens):
    logits = [torch.full((1, 9), float(token)) for token in tokens]
    return SimpleNamespace(sequences=torch.tensor([[0, *tokens]]), logits=logits, scores=logits)


def test_what_follows_other_words_or_is_there_once_does_not_count():
    found, expected = while_alike(said(3, 4, 5, 6), said(3, 7, 5))
    assert found.shape == expected.shape == (1, 3, 9)
    assert found[0, :, 0].tolist() == [3, 4, 0]
    assert expected[0, :, 0].tolist() == [3, 7, 0]
