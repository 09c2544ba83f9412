"""A tokenizer of a few words, and models whose gates read them."""

from __future__ import annotations

from kit.gazing import steer

OPEN, CLOSE, WAIT, HOLD = 81, (82, 85), 83, (84, 87)
"""Tokens of the tags and phrases."""


class Words:
    """A tokenizer of a few words: `</think>` and "hold on" take two tokens."""

    def __init__(self):
        self.words = {"<think>": (OPEN,), "</think>": CLOSE, "wait": (WAIT,), "Wait": (86,), "hold on": HOLD, "Hold on": (88, 87)}

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": list(self.words.get(text.strip(), ()))}

    def decode(self, ids):
        return next((word for word, own in self.words.items() if own == tuple(ids)), "?")


def gated(family, **attention):
    return steer(family, strength=2.0, heads="all", **attention)
