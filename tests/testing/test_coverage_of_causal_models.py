"""Every causal language model of the installed transformers, tiny and random, against a float oracle."""

from __future__ import annotations

import pytest
from kit.covering import check_coverage

from hf_steer.testing.zoo import architectures

CAUSAL = [one for one in architectures() if one.kind == "causal"]


@pytest.mark.parametrize("architecture", CAUSAL, ids=str)
def test_it_is_steered_as_the_oracle_says_or_refused_for_a_known_reason(architecture):
    check_coverage(architecture)
