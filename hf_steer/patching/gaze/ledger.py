"""One call of `generate`, and the ledger of its passes: none that speaks is left out unseen.

Every pass goes on with the prompt's saliency or is unsteered by design; what is neither raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_steer.errors import PatchError, SaliencyError
from hf_steer.ground.arguments import Given
from hf_steer.patching.gaze.memory import CacheState
from hf_steer.patching.gaze.prompt import Prompt, begins_prompt
from hf_steer.saliency import EyeRecord, Saliency

VIRTUAL = (
    "(PEFT's prompt or prefix tuning adds them), so scores would land on other tokens than they were given for. Run it inside "
    "disable_steering(model), or use an adapter without virtual tokens, such as LoRA."
)


@dataclass(eq=False)
class Generation:
    """One call of `generate`: its whole prompt, known before chunks, beams and encoding take it apart; and its ledger.

    Attributes:
        ids: of the whole prompt; None when only embeddings came.
        mask: of the whole prompt; None where all tokens are real.
        prompt: as the gaze reads it; None where its passes are not steered: it has no gaze, or is a draft by the model itself,
            which the steered passes check.
        steers: whether its passes belong to it for the gaze: steering is on, and it has a prompt.
        statement: what the call itself, or the block around it, says.
        block: what the block around it says.
        past: keys in its cache when it began.
        asks: whether anything is to be steered in it: something is said, or there is something to see.
        guided: classifier-free guidance runs passes of its own, which see no prompt and are unsteered by design.
        drafts: the model drafts for itself.
        records: what the vision tower recorded for it.
        started: whether its first pass has come.
        state: of a `generate` without a cache.
        steered: passes that went on with the prompt's saliency.
        unconditional: passes of guidance, which are unsteered by design.
        compiled: some passes were compiled, and not counted.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    prompt: Prompt | None = None
    steers: bool = False
    statement: Saliency | None = None
    block: Saliency | None = None
    past: int = 0
    asks: bool = False
    guided: bool = False
    drafts: bool = False
    records: list[EyeRecord] = field(default_factory=list)
    started: bool = False
    state: CacheState | None = None
    steered: int = 0
    unconditional: int = 0
    compiled: bool = False

    def owns(self, given: Given, state: CacheState | None, said: Saliency | None, block: Saliency | None, *, sees: bool) -> bool:
        """Whether a pass is one of this call's: not one that is asked for by itself, or that stands for itself.

        Args:
            given: the arguments of the pass.
            state: of its cache.
            said: what the pass's own call says.
            block: what the block around it says.
            sees: whether the model itself says where to look.
        """
        if not self.steers or said is not None or (self.prompt is not None and block is not self.block):
            return False
        if self.prompt is None or self.asks or self.guided or not self.started or torch.compiler.is_compiling():
            return True
        return state is not None or (sees and given.perceives)  # a later one on a cache of its own: nothing was asked of it

    def admit(self, given: Given, state: CacheState | None) -> tuple[Prompt | None, CacheState | None] | None:
        """What a pass begins with: the first gets the prompt, and so does every other on a fresh cache; later ones go on with
        what their cache carries; None for a pass that is unsteered by design.

        Raises:
            PatchError: a pass that belongs to nobody.
            SaliencyError: virtual tokens came before the prompt.
        """
        prompt, compiling = self.prompt, torch.compiler.is_compiling()
        if prompt is None:
            return None
        new: Prompt | None = None
        if not self.started:
            if not compiling and self.asks:
                self._refuse_virtual(given, prompt)
            self.started, new = True, prompt
        elif state is None:
            if self.guided and self.steered > self.unconditional:
                # guidance's own pass follows each of the prompt's; what it reads may begin as the prompt does
                self.unconditional += not compiling
                return None
            if given.cache is None and self.state is not None and begins_prompt(given, prompt):
                state = self.state
            elif not compiling and int(given.past) == self.past and begins_prompt(given, prompt):
                new = prompt
            elif self.guided or not self.asks:
                self.unconditional += not compiling
                return None
            else:
                self._refuse_foreign(given)
        if compiling:
            self.compiled = True  # a graph would be made anew for every count
        else:
            self.steered += 1
        return new, state

    def close(self) -> None:
        """At its end: every pass was steered, or was unsteered by design.

        Raises:
            PatchError: no pass came by, or more than guidance accounts for went without.
        """
        if self.prompt is None or not self.asks:
            return
        if not self.started:
            raise PatchError(
                "generate ran, and none of its forward passes reached hf_steer's hooks, so nothing was steered: the hooks were "
                "removed, or the model's forward is called directly. Patch the model again: hf_steer.unpatch_model(model), then "
                "patch_model."
            )
        if self.guided and not self.compiled and self.unconditional > self.steered > 0:
            raise PatchError(
                f"{self.unconditional} passes of a generate with guidance went unsteered beside {self.steered} steered ones; "
                "guidance accounts for as many at most. A cache lost its saliency; please report this with the model's name."
            )

    def _refuse_foreign(self, given: Given) -> None:
        raise PatchError(
            "a forward pass inside generate is not one of generate's own, or came on a cache that has lost its saliency: it "
            f"brings {given.count_tokens()} tokens on a cache of {int(given.past)} keys, and neither begins with the "
            "prompt nor goes on after it. Where a logits processor or stopping criterion calls the model, do it inside "
            "disable_steering(model), or say where that call looks: model(..., saliency=...)."
        )

    def _refuse_virtual(self, given: Given, prompt: Prompt) -> None:
        """Prompt tuning puts tokens before the prompt after `generate` was called: scores would land on them."""
        past, tokens = int(given.past), given.source
        more = past - self.past
        if more == 0 and tokens is not None and tokens.ndim == 3 and prompt.ids is not None and given.ids is None:
            more = tokens.shape[1] - (prompt.first_position + prompt.shape[1] - past)
        if more > 0:
            raise SaliencyError(f"{more} virtual tokens came before the prompt that generate was called with {VIRTUAL}")


def refuse_longer(given: Given, scores: Any) -> None:
    """SaliencyError where embeddings came for more tokens than the saliency speaks of.

    Args:
        given: the arguments of a pass on an empty cache.
        scores: one per token, as they were said; None where nothing of the kind was.
    """
    if given.ids is None and scores is not None and given.count_tokens() > scores.shape[1]:
        raise SaliencyError(
            f"the saliency speaks of {scores.shape[1]} tokens, and {given.count_tokens()} embeddings came: virtual tokens may have "
            f"come before the prompt {VIRTUAL}"
        )
