"""The hooks of the model itself, the one place where a pass begins and ends, and its `generate`."""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import nn

from hf_steer.attention import CURRENT_PASS
from hf_steer.errors import PatchError
from hf_steer.ground.arguments import Given, inferred_mask, own_spellings, read_call, read_generate
from hf_steer.ground.decoders import reads_encoder
from hf_steer.ground.longform import SEGMENT, goes_by_stretches, rows_in, seconds_of, source_in, stretch_in
from hf_steer.patching.aligning.hooks import Aligners
from hf_steer.patching.blocks import Block
from hf_steer.patching.gaze.begin import begin_gaze, refuse_unseen, warn_of_others
from hf_steer.patching.gaze.hooks import Gaze
from hf_steer.patching.gaze.learned import LearnedStrengths
from hf_steer.patching.gaze.ledger import Generation
from hf_steer.patching.gaze.memory import read_state
from hf_steer.patching.gaze.prompt import read_prompt
from hf_steer.patching.passes import Pass, live_pass, pass_of
from hf_steer.patching.planned import Plan
from hf_steer.patching.scopes import CALL, SAID, SOURCE, STEERING, STRETCH, Scope, Source, Stretch, scope_of, take_statement


class Root(nn.Module):
    """Plan and parts of one patched model, its gaze, its aligners and what it learned, and the hooks that tie them together."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.overridden = {name: vars(plan.anatomy.root).get(name) for name in ("generate", "save_pretrained", SEGMENT)}
        self.warned = False
        self.compiled_pass: Pass | None = None
        anatomy = plan.anatomy
        towers = (encoder.tower for encoder in anatomy.encoders.values())
        for module in (anatomy.root, anatomy.base, anatomy.decoder, anatomy.tower, *towers):
            own_spellings(type(module))  # looked up before anything is compiled
        self.pairs = reads_encoder(anatomy.root)
        self.hands_on = anatomy.carried == "keyword" and not self.pairs
        """Whether the model hands our keyword on to its decoder; an encoder beside it would get it, too."""
        self.gaze = Gaze(plan, self)
        self.aligners = Aligners(plan, self)
        self.prompted = self.aligners.asks_for_prompts
        self.learned = LearnedStrengths(plan) if plan.config.learns_strength else None

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Root, or the base model alone, as PEFT calls it: begin a pass. What the hooks further in cannot see is read here."""
        if STEERING in kwargs:  # the root has begun it
            return None
        said, kwargs = take_statement(self, kwargs)
        scope = scope_of(self)
        if getattr(module, "_is_replica", False) and not scope.off:
            _refuse_replica()
        if not (self.plan.strengths or len(self.aligners)):  # strengths of 0 change nothing
            return args, kwargs
        root = self.plan.anatomy.root
        given = read_call(module, args, kwargs)
        if module is not root and said is None and self._joins(scope, given):
            return args, kwargs
        current = Pass(given=given, scope=scope, by=module, watched=module is root, said=said)
        if self.plan.strengths:
            begin_gaze(self, current, given.of_decoder() if self.pairs else given, said)
        if len(self.aligners):
            self.aligners.begin(current, given)
        self.enter(current)
        return args, {**kwargs, STEERING: current} if current.steers and self.hands_on else kwargs

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Root and base model: end the pass; gates learn from its logits, and the load-balancing losses join its loss."""
        current = kwargs.get(STEERING) or pass_of(self)
        if not isinstance(current, Pass):
            return None
        if current.by is module:
            self.leave(current)
        if output is None:  # interrupted
            return None
        if current.steers and not current.arrived:
            raise PatchError(
                "what steers this pass did not reach the decoder: something between the model and its decoder (a hook, a wrapper, "
                "a replaced decoder or forward) does not hand the keyword 'hf_steer' on. Let it pass **kwargs through, patch the "
                "model after such changes, or run inside disable_steering(model)."
            )
        learns = self.gaze.remembers or bool(current.scope.listeners)
        if learns and current.steers and module is self.plan.anatomy.root:
            self.gaze.after_model(current, output)
        return self.aligners.with_balance(current, output) if current.trains and current.by is module else None

    def _joins(self, scope: Scope, given: Given) -> bool:
        """Whether the base model is called by a root whose pass is not steered, or that does not hand the keyword on."""
        begun = pass_of(self)
        if begun is None or begun.by is not self.plan.anatomy.root or begun.joined or begun.arrived:
            return False
        if begun.steers and not begun.brings(given.of_decoder() if self.pairs else given):
            return False
        begun.joined = begun.scope == scope
        return begun.joined

    def enter(self, current: Pass) -> None:
        """Make a pass the current one of this thread; in a compiled graph, which cannot trace context variables, of the model."""
        if torch.compiler.is_compiling():
            if current.aligns or self.plan.eyes or not self.hands_on:
                self.compiled_pass = current
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_call_impl":  # the call of the module whose hook runs now
            frame = frame.f_back
        around = CURRENT_PASS.get()
        current.steering, current.frame, current.outer = self, frame, None if around is None else live_pass()
        CURRENT_PASS.set(current)

    def leave(self, current: Pass) -> None:
        """Go back to the pass around it."""
        if torch.compiler.is_compiling():
            if self.compiled_pass is not None:
                self.compiled_pass = None
        elif current.frame is not None:
            current.frame = None
            CURRENT_PASS.set(current.outer)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with its prompt kept whole for the forward passes that it is taken apart into.

        `saliency=` says where to look in this call, whatever thread or pool it runs in.
        """
        original = self.original("generate")
        if (self.pairs or self.gaze.crosses) and (self.plan.strengths or self.prompted):
            return self._generate_apart(original, args, kwargs)
        call, kwargs = self._open(args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        with Block(self, CALL, call, follows=False):
            result = original(*args, **kwargs)
        if call.asks and inspect.isgenerator(result):
            raise PatchError(
                "this custom_generate gives a generator, whose passes run after generate has returned, when its prompt is no "
                "longer known. Let it run to its end and return the tokens, or run inside disable_steering(model)."
            )
        call.close()
        return result

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Generation | None, dict[str, Any]]:
        """A `generate` before it runs, and its other arguments; None where its passes need not know of it."""
        said, kwargs = take_statement(self, kwargs)
        scope, root, gazes = scope_of(self), self.plan.anatomy.root, bool(self.plan.strengths)
        if not (gazes or self.prompted):
            return None, kwargs
        given = read_generate(args, kwargs)
        if given.mask is None:
            given = given.with_mask(inferred_mask(given, root))
        call = Generation(ids=given.ids, mask=given.mask)
        known = call if self.prompted and given.ids is not None else None
        if not gazes or scope.off:
            return known, kwargs
        if scope.call is not None and scope.call.drafts:
            call.steers = True
            return call, kwargs
        call.past, guided, drafts = int(given.past), given.guides(root), given.drafts_for(root)
        call.block = scope.saliency
        call.statement = statement = call.block if said is None else said
        if statement is None:
            warn_of_others(self)
        call.prompt = prompt = read_prompt(given, self.plan, statement, past=call.past, whole=True)
        if prompt is None:
            return known, kwargs
        state = None if given.cache is None else read_state(given.cache)
        if unseen := call.past if state is None else state.unseen_among(call.past):
            seen = None if prompt.ids is None or prompt.first_position else prompt.ids[:, : call.past]
            refuse_unseen(self.plan, statement, unseen, seen)
        sees = self.gaze.sees and (prompt.ids is None or bool(prompt.spans))
        call.asks = statement is not None or sees or (state is not None and state.speaks)
        call.steers, call.guided, call.drafts = True, guided, drafts
        return call, kwargs

    def _generate_apart(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A `generate` whose passes each begin by themselves, with what is said around them: what its decoder begins with is not
        known yet, and each pass says what it is."""
        said, kwargs = take_statement(self, kwargs)
        with ExitStack() as blocks:
            if said is not None:
                blocks.enter_context(Block(self, SAID, said, follows=False))
            source = source_in(args, kwargs)
            if source is not None:
                seconds = seconds_of(source) if goes_by_stretches(self.plan.anatomy.root) and source.ndim == 3 else 0.0
                blocks.enter_context(Block(self, SOURCE, Source(len(source), seconds), follows=False))
            return original(*args, **kwargs)

    def generate_stretch(self, **kwargs: Any) -> Any:
        """transformers' decoding of one stretch of each sound, with where that lies in the whole sound."""
        original, source = self.original(SEGMENT), scope_of(self).source
        if source is None:
            return original(**kwargs)
        rows, starts = stretch_in(kwargs)
        repeated = max(1, rows_in(kwargs) // source.rows)
        stretch = Stretch(tuple(row // repeated for row in rows), starts, source.seconds)
        anew = Source(source.rows, source.seconds)  # each stretch has a prompt of its own
        with Block(self, STRETCH, stretch, follows=False), Block(self, SOURCE, anew, follows=False):
            return original(**kwargs)

    def original(self, name: str) -> Any:
        """A method of the root model as it was before patching."""
        root = self.plan.anatomy.root
        return self.overridden[name] or getattr(type(root), name).__get__(root)


def _refuse_replica() -> None:
    raise PatchError(
        "this is a replica that nn.DataParallel made of a patched model, and hooks of the original cannot steer it. Use "
        "one process per GPU: torchrun with DistributedDataParallel (accelerate and Trainer do that); or one visible GPU; "
        "or run inside disable_steering(model)."
    )
