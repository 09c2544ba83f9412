"""The words of a prompt, for the aligners that read them: the whole prompt's, of which a pass may see a piece, and no answer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import AlignerError
from hf_steer.ground.arguments import IGNORED_LABEL
from hf_steer.patching.aligning.building import placeholders_in
from hf_steer.patching.gaze.prompt import real_tokens
from hf_steer.patching.passes import Pass
from hf_steer.patching.planned import PlannedAligner


def prompt_text(root: Any, current: Pass, planned: PlannedAligner, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt, and which of its tokens are words; the answer is none of them.

    Args:
        root: of the model.
        current: the pass, which brings token numbers.
        planned: the aligner that reads.
        mask: `(rows, tokens)` bool: where its features stand.

    Raises:
        AlignerError: a prompt without a word that is not labelled.
    """
    given, call = current.given, current.scope.call
    ids: Tensor = given.ids  # type: ignore[union-attr]
    own = given.mask if given is not None else None
    real = real_tokens(own, ids.shape[1]) if isinstance(own, Tensor) else None
    whole = ids
    if call is not None and call.ids is not None:
        whole, real = call.ids, call.mask
    copies = ids.shape[0] // whole.shape[0]
    whole = whole.to(ids.device).repeat_interleave(copies, 0)
    words = ~placeholders_in(whole, planned)
    if real is not None:
        words &= real[:, -whole.shape[1] :].to(ids.device).bool().repeat_interleave(copies, 0)
    labels = None if given is None else given.labels
    if labels is not None:
        words &= (labels != IGNORED_LABEL).cumsum(1) == 0
        if not torch.compiler.is_compiling() and not bool(words[mask.any(1)].any(1).all()):
            raise AlignerError(
                "a prompt has no word that is not labelled, so that its aligner has nothing to read; label the answer alone, "
                f"and give the prompt's tokens the label {IGNORED_LABEL}."
            )
    words = words | ~mask.any(1, keepdim=True)  # rows that perceive nothing need no text
    return root.get_input_embeddings()(whole), words
