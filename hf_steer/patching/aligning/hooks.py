"""The aligners of one patched model, and the hooks that carry features to them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.aligners import Routing
from hf_steer.errors import AlignerError
from hf_steer.ground.arguments import IGNORED_LABEL, Given, read_call, with_changes
from hf_steer.ground.outputs import features_in, with_added_loss, with_features
from hf_steer.patching.aligning.balancing import balance_of, check_trainable, refuse_unlabelled, trained
from hf_steer.patching.aligning.building import build_placed, placeholders_in
from hf_steer.patching.aligning.passes import (
    Pass,
    balances_of,
    begin_pass,
    current_pass,
    end_pass,
    forget_pass,
    listener_of,
    prompt_of,
)
from hf_steer.patching.edits import AddHook
from hf_steer.patching.gaze.runtime import real_tokens
from hf_steer.patching.planned import Plan, PlannedAligner
from hf_steer.patching.scopes import statement_for


class Aligners(nn.ModuleList):
    """One module per configured aligner, in float32 beside a half-precision base, on the device of its encoder."""

    def __init__(self, plan: Plan, owner: nn.Module) -> None:
        super().__init__(build_placed(planned) for planned in plan.aligners)
        self.plan = plan
        self.owner: tuple[nn.Module, ...] = (owner,)  # in a tuple, so that it does not become a submodule of its own submodule
        self.compiled_pass: Pass | None = None

    @property
    def reads_text(self) -> bool:
        """Whether any of them reads the prompt's text."""
        return any(planned.reads_text for planned in self.plan.aligners)

    @property
    def meets_text(self) -> bool:
        """Whether any of them lies behind the projector, among the prompt's text."""
        return any(planned.config.placement == "projector" for planned in self.plan.aligners)

    def edits(self) -> Iterator[AddHook]:
        """The hooks, outermost last."""
        towers = {}
        for index, planned in enumerate(self.plan.aligners):
            encoder = planned.encoder
            towers[id(encoder.tower)] = encoder.tower
            if planned.config.placement == "layers":
                for number, site in enumerate(planned.layers):
                    yield AddHook(site.module, "after", partial(self.after_layer, index, number))
            elif planned.config.placement == "projector":
                yield AddHook(self.plan.anatomy.decoder, "before", partial(self.before_decoder, index))
            elif encoder.reads:
                yield AddHook(encoder.outlet, "before", partial(self.before_outlet, index))
            else:
                yield AddHook(encoder.outlet, "after", partial(self.after_outlet, index))
        for tower in towers.values():
            yield AddHook(tower, "before", self.before_tower)
        root, base = self.plan.anatomy.root, self.plan.anatomy.base
        for module in (root,) if base is root else (base, root):
            yield AddHook(module, "before", self.before_model)
            yield AddHook(module, "finally", self.after_model)

    @property
    def enabled(self) -> bool:
        """Whether steering is on for this thread."""
        return statement_for(self.owner[0])[0]

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Root, or the base model called by itself: note what the hooks further in cannot see."""
        root = module is self.plan.anatomy.root
        if root:
            forget_pass(self)
        if (not root and current_pass(self) is not None) or not self.enabled:
            return None
        given = read_call(module, args, kwargs)
        learns = module.training and torch.is_grad_enabled()
        labels, ids, mask = given.labels, given.ids, given.mask
        # features that the caller put among the embeddings are where the placeholders are
        perceives = given.perceives or (ids is not None and given.embeds is not None and self._holds_place(ids))
        trains = learns and labels is not None
        if learns and not trains and perceives:
            refuse_unlabelled(self)
        if trains and not torch.compiler.is_compiling():
            check_trainable(self, module)
        balances = [] if trains else balances_of(self)
        if not (trains or self.meets_text or balances is not None or listener_of(self) is not None):
            return None
        frames = given.mel_mask if given.mel_mask is not None else self._own_mask(given)
        real = real_tokens(mask, ids.shape[1]) if isinstance(mask, Tensor) and ids is not None else None
        begin_pass(
            self,
            Pass(
                ids=ids,
                real=real,
                labels=labels,
                perceives=perceives,
                frames=frames if isinstance(frames, Tensor) and frames.ndim == 2 else None,
                balances=balances,
                trains=trains,
                by=module,
            ),
        )
        return None

    def _own_mask(self, given: Given) -> Any:
        """The argument that says which frames are real, where this model has no other use for it."""
        names = [planned.encoder.mask for planned in self.plan.aligners if planned.encoder.mask is not None]
        return next((given.named.get(name) for name in names), None)

    def _holds_place(self, ids: Tensor) -> bool:
        """Whether features of any of the encoders stand among these tokens."""
        if torch.compiler.is_compiling():
            return self.meets_text
        return self.meets_text and any(bool(placeholders_in(ids, planned).any()) for planned in self.plan.aligners)

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Encoder: some are told which of their frames are real; nothing is more exact."""
        current, mask = current_pass(self), read_call(module, args, kwargs).mask
        if current is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            current.frames = mask

    def after_layer(
        self, index: int, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Encoder layer: steer its hidden states."""
        if not self.enabled:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if self.plan.aligners[index].own_layers:
            steered = self._steer(index, hidden, number, layer=number)
        else:
            steered = self._steer(index, hidden, layer=number)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def before_outlet(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Projector: steer the features that it reads."""
        if not self.enabled:
            return None
        if args:
            return (self._steer(index, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._steer(index, kwargs[name])}

    def after_outlet(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Encoder: steer the features that it hands on."""
        if not self.enabled:
            return None
        return with_features(output, self._steer(index, features_in(output)))

    def before_decoder(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: what stands for pictures and sounds lies among the text here, row by row."""
        current = current_pass(self)
        if not self.enabled or (current is not None and not current.perceives and current.ids is not None):
            return None
        given = read_call(module, args, kwargs)
        embeds = given.embeds
        if embeds is None:
            return None
        if current is None or not current.perceives:
            self._refuse_unplaced(index)
            return None
        ids = current.ids
        if ids is None or ids.shape != embeds.shape[:2]:
            raise AlignerError(
                "an aligner behind the projector needs input_ids with one placeholder token per feature, as processors make "
                f"them; got {None if ids is None else tuple(ids.shape)} for {tuple(embeds.shape[:2])} embeddings."
            )
        planned = self.plan.aligners[index]
        mask = placeholders_in(ids, planned)
        if planned.reads_text:
            text, text_mask = self._prompt_text(ids, current, planned, mask)
            steered = self._steer(index, embeds, text.to(embeds), mask=mask, text_mask=text_mask)
        else:
            steered = torch.where(mask.unsqueeze(-1), self._steer(index, embeds, mask_of_tokens=mask), embeds)
        return (), with_changes(module, given, embeds=steered)

    def _refuse_unplaced(self, index: int) -> None:
        """AlignerError for embeddings of which nothing says where features stand, once the aligner would change any."""
        if torch.compiler.is_compiling() or self._is_identity(index):
            return
        raise AlignerError(
            "an aligner behind the projector steers the features that stand for pictures and sounds among the text, and these "
            "embeddings came without input_ids, so where they stand is unknown. Call the model itself, with pixels or sounds, or "
            "with input_ids beside inputs_embeds; or run inside disable_steering(model)."
        )

    @torch.no_grad()
    def _is_identity(self, index: int) -> bool:
        """Whether an aligner behind the projector still changes nothing, as a fresh one does."""
        planned, module = self.plan.aligners[index], self[index]
        like = next(module.parameters())
        features = torch.linspace(-1, 1, 2 * planned.size, dtype=like.dtype, device=like.device).view(1, 2, planned.size)
        more = (features,) if planned.reads_text else ()
        return torch.equal(module(features, *more), features)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Root: the load-balancing losses join the loss."""
        current = current_pass(self)
        if current is None or current.by is not module:
            return None
        end_pass(self, current)
        if not current.trains or output is None:
            return None
        extra = balance_of(self, current, Given(kwargs).loss_items)
        if not current.perceives:  # a batch of text alone: its loss must reach the parameters all the same, with zeros
            extra = extra + 0.0 * sum(parameter.sum().to(extra.device) for parameter in trained(self))
        return with_added_loss(output, extra)

    def _steer(
        self, index: int, features: Tensor, *more: Any, layer: int | None = None, mask_of_tokens: Tensor | None = None, **masks: Any
    ) -> Tensor:
        """Features through their aligner; its routing to whoever wants it."""
        planned, module = self.plan.aligners[index], self[index]
        if isinstance(module, nn.ModuleList) and layer is not None:
            module = module[layer]
        device = next((parameter.device for parameter in module.parameters() if not parameter.is_meta), features.device)
        features = features.to(device)  # under offload features may still lie where they were made
        current, listener = current_pass(self), listener_of(self)
        weight = planned.config.load_balancing_weight or 0.0
        balances = current.balances if current is not None and weight else None
        if (balances is None and listener is None) or not planned.routes:
            steered: Tensor = module(features, *more, **masks)
            return steered
        routing: Routing
        steered, routing = module(features, *more, return_routing=True, **masks)
        mask = masks.get("mask", mask_of_tokens)
        if mask is None and current is not None:
            mask = current.mask_for(features)
        if balances is not None:
            balances.append(weight * routing.load_balancing_loss(mask) / max(1, len(planned.layers)))
        if listener is not None:
            place = f"{planned.config.modality}.{planned.config.placement}"
            if layer is not None and isinstance(self[index], nn.ModuleList):
                place = f"{place}.{planned.layers[layer].index}"
            listener.hear(place, routing, mask)
        return steered

    def _prompt_text(self, ids: Tensor, current: Pass, planned: PlannedAligner, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompt, and which of its tokens are words; the answer is none of them."""
        held = prompt_of(self)
        whole, real = (ids, current.real) if held is None else held
        copies = ids.shape[0] // whole.shape[0]
        whole = whole.to(ids.device).repeat_interleave(copies, 0)
        words = ~placeholders_in(whole, planned)
        if real is not None:
            words &= real[:, -whole.shape[1] :].to(ids.device).bool().repeat_interleave(copies, 0)
        if current.labels is not None:
            words &= (current.labels != IGNORED_LABEL).cumsum(1) == 0
            if not torch.compiler.is_compiling() and not bool(words[mask.any(1)].any(1).all()):
                raise AlignerError(
                    "a prompt has no word that is not labelled, so that its aligner has nothing to read; label the answer alone, "
                    f"and give the prompt's tokens the label {IGNORED_LABEL}."
                )
        words = words | ~mask.any(1, keepdim=True)  # rows that perceive nothing need no text
        return self.plan.anatomy.root.get_input_embeddings()(whole), words
