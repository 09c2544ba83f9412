"""What has to be followed to understand one steered call stays short."""

from __future__ import annotations

import pytest
from kit.moves import steered_calls

MOST = {"forward": 36, "generate": 75}
"""Moves between files. As the same count has it, there were 73 and 124 before passes and scopes were one object each, and 133 and
250 when `ground` had come."""


@pytest.fixture(scope="module")
def calls():
    return steered_calls()


@pytest.mark.parametrize("name", MOST)
def test_a_steered_call_goes_through_few_files(calls, name):
    files = calls[name]
    assert len(files) > 20  # the count sees the package at all
    assert len(files) - 1 <= MOST[name], " ".join(files)


def test_no_file_of_the_gaze_is_entered_again_and_again(calls):
    hooks = calls["forward"].count("patching/gaze/hooks.py")
    assert 0 < hooks <= 3
