"""The aligners of one patched model, and the hooks that carry features to them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_steer.aligners import Routing
from hf_steer.errors import AlignerError
from hf_steer.ground.arguments import Given, read_call, with_changes
from hf_steer.ground.caches import past_of
from hf_steer.ground.outputs import features_in, with_added_loss, with_features
from hf_steer.patching.aligning.balancing import balance_of, trained
from hf_steer.patching.aligning.begin import begin_aligners, real_frames
from hf_steer.patching.aligning.building import build_placed, laid_out_as, placeholders_in, refuse_pieces
from hf_steer.patching.aligning.text import prompt_text
from hf_steer.patching.edits import AddHook
from hf_steer.patching.passes import Pass, pass_of
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import scope_of


class Aligners(nn.ModuleList):
    """One module per configured aligner, in float32 beside a half-precision base, on the device of its encoder."""

    def __init__(self, plan: Plan, owner: nn.Module) -> None:
        super().__init__(build_placed(planned) for planned in plan.aligners)
        self.plan = plan
        self.owner: tuple[Any, ...] = (owner,)  # in a tuple, so that it does not become a submodule of its own submodule

    @property
    def reads_text(self) -> bool:
        """Whether any of them reads the prompt's text."""
        return any(planned.reads_text for planned in self.plan.aligners)

    @property
    def asks_for_prompts(self) -> bool:
        """Whether any of them must know the whole prompt of a `generate`, of which a pass may see a piece."""
        return self.reads_text or any(planned.config.merge for planned in self.plan.aligners)

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

    def begin(self, current: Pass, given: Given) -> None:
        """The aligners' part of a pass that begins."""
        begin_aligners(self, current, given)

    def _held(self) -> tuple[bool, Pass | None]:
        """Whether steering is on here, and the pass, where the aligners take part in one."""
        steering = self.owner[0]
        current = pass_of(steering)
        return not scope_of(steering).off, current if current is not None and current.aligns else None

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Encoder: some are told which of their frames are real; nothing is more exact."""
        (_, current), mask = self._held(), read_call(module, args, kwargs).mask
        if current is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            current.frames = mask

    def after_layer(
        self, index: int, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Encoder layer: steer its hidden states."""
        if not self._held()[0]:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if self.plan.aligners[index].own_layers:
            steered = self._steer(index, hidden, number, layer=number)
        else:
            steered = self._steer(index, hidden, layer=number)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def before_outlet(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Projector: steer the features that it reads."""
        if not self._held()[0]:
            return None
        name = self.plan.aligners[index].encoder.argument
        if args and name not in kwargs:
            return (self._steer_read(index, args[0]), *args[1:]), kwargs
        name = name if name in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: self._steer_read(index, kwargs[name])}

    def _steer_read(self, index: int, features: Tensor) -> Tensor:
        """What an outlet reads; before a convolution the features are the second dimension."""
        if not self.plan.aligners[index].encoder.channels_first:
            return self._steer(index, features)
        return self._steer(index, features.movedim(1, -1)).movedim(-1, 1)

    def after_outlet(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Encoder: steer the features that it hands on."""
        if not self._held()[0]:
            return None
        return with_features(output, self._steer(index, features_in(output)))

    def before_decoder(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder: what stands for pictures and sounds lies among the text here, row by row."""
        on, current = self._held()
        asked = None if current is None or current.given is None else current.given.ids
        if not on or (asked is not None and current is not None and not current.perceives):
            return None
        given = read_call(module, args, kwargs)
        embeds = given.embeds
        if embeds is None:
            return None
        if current is None or not current.perceives:
            self._refuse_unplaced(index)
            return None
        ids = asked
        if ids is None or ids.shape != embeds.shape[:2]:
            raise AlignerError(
                "an aligner behind the projector needs input_ids with one placeholder token per feature, as processors make "
                f"them; got {None if ids is None else tuple(ids.shape)} for {tuple(embeds.shape[:2])} embeddings."
            )
        planned = self.plan.aligners[index]
        mask = placeholders_in(ids, planned)
        if planned.reads_text:
            text, text_mask = prompt_text(self.plan.anatomy.root, current, planned, mask)
            steered = self._steer(index, embeds, text.to(embeds), mask=mask, text_mask=text_mask)
        else:
            told: dict[str, Any] = {"mask" if planned.config.merge else "mask_of_tokens": mask}
            if planned.config.merge:
                refuse_pieces(current, mask, past_of(given.cache))
            steered = torch.where(mask.unsqueeze(-1), self._steer(index, embeds, **told), embeds)
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

    def with_balance(self, current: Pass, output: Any) -> Any:
        """The root's output with the load-balancing losses of a training step in its loss."""
        extra = balance_of(self, current)
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
        if features.shape[-1] != planned.size:
            raise AlignerError(
                f"an aligner for {planned.config.modality} with placement {planned.config.placement!r} was made for features of "
                f"size {planned.size}, and {type(planned.encoder.outlet).__name__} came with {tuple(features.shape)}. Please "
                "report the model; another placement may do."
            )
        device = next((parameter.device for parameter in module.parameters() if not parameter.is_meta), features.device)
        features = features.to(device)  # under offload features may still lie where they were made
        _, current = self._held()
        weight = planned.config.load_balancing_weight or 0.0
        balances = None if current is None or not weight else current.balances
        listeners = [own for own in scope_of(self.owner[0]).listeners if own.follows_routing]
        if (balances is None and not listeners) or not planned.routes:
            steered: Tensor = module(features, *more, **masks)
            return laid_out_as(steered, features)
        routing: Routing
        steered, routing = module(features, *more, return_routing=True, **masks)
        mask = masks.get("mask", mask_of_tokens)
        if mask is None and current is not None:
            mask = real_frames(current.frames, features)
        if balances is not None:
            balances.append(weight * routing.load_balancing_loss(mask) / max(1, len(planned.layers)))
        place = f"{planned.config.modality}.{planned.config.placement}"
        if layer is not None and isinstance(self[index], nn.ModuleList):
            place = f"{place}.{planned.layers[layer].index}"
        for listener in listeners:
            listener.routed(place, routing, mask)
        return laid_out_as(steered, features)
