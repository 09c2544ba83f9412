"""One architecture of transformers against what is known of it."""

from __future__ import annotations

from kit.known_gaps import gap_of

from hf_steer.testing.coverage import cover


def check_coverage(architecture) -> None:
    """Steered as the oracle says in every way that it can be run, undone, bit-equal where nothing is said; or its reason."""
    found = cover(architecture.model_type, architecture.class_name)
    gap = gap_of(architecture)
    if gap is None:
        assert found.covered, f"{found.failed}: {found.reason}"
        return
    assert not found.covered, f"{architecture} is covered now: take its row out of kit/known_gaps.py"
    assert gap in found.reason, found.reason
    assert found.stages["undo"] is not False
    assert found.stages["unsteered"] is not False
