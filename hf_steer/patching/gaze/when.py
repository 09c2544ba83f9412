"""When to steer, in one forward pass: which queries generate, in which phase they are, and how far their gates are open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_steer.config import AttentionConfig, GateConfig
from hf_steer.errors import PatchError, SaliencyError
from hf_steer.gating import GateState, Patterns, Track, fresh_state, gate_of, observe, read_tokens, state_after
from hf_steer.patching.gaze.memory import Gates
from hf_steer.patching.gaze.prompt import Prompt

_PADDING = -2
"""Stands for padding tokens, so that no pattern matches them."""


@dataclass(frozen=True)
class PassFacts:
    """What is known of one forward pass before the decoder runs.

    Attributes:
        rows: of the batch, repeated for beams.
        queries: tokens of this pass.
        past: keys in the cache before it.
        device: of the decoder's input.
        cached: whether there is a cache.
        training: a training step.
        tokens: `(rows, queries)`; None when only embeddings came.
        prompt: what is new in this pass; None when it only continues.
        prompt_end: key position after the prompt, inside `generate`.
        gates: what rode on the cache.
        traced: whether somebody wants to know.
        watched: whether the root model's own call surrounds this pass, so that its logits can be seen.
        kind: of what is said, a key of `MANNERS`.
    """

    rows: int
    queries: int
    past: int | Tensor
    device: torch.device
    cached: bool
    training: bool
    tokens: Tensor | None
    prompt: Prompt | None
    prompt_end: int | None
    gates: Gates | None
    traced: bool
    watched: bool
    kind: str

    @property
    def positions(self) -> Tensor:
        """`(queries,)` of the keys that these tokens become."""
        return self.past + torch.arange(self.queries, device=self.device)

    @property
    def ends_prompt(self) -> bool:
        """Whether a token is generated out of this pass: not out of a piece of a prompt that is read in chunks."""
        return self.prompt_end is None or self.queries == 1 or int(self.past) + self.queries >= self.prompt_end


@dataclass(frozen=True)
class Pace:
    """When one forward pass is steered.

    Attributes:
        factor: `(rows, queries)` on λ; None for 1 everywhere.
        gate: `(rows, queries)`, the gate's part of it; None without a gate.
        phase: `(rows, queries)`: 0 prompt, 1 thinking, 2 answer; all that is generated is 2 where nobody reads tokens.
        before: state before the pass; None where nothing is remembered.
        track: through its tokens; None where nobody reads them.
        columns: the queries after which the state is kept, `(rows,)` each, in order; those that a token is generated out of.
        measures: whether their distributions are measured.
        end: keys in the cache after the pass.
    """

    factor: Tensor | None = None
    gate: Tensor | None = None
    phase: Tensor | None = None
    before: GateState | None = None
    track: Track | None = None
    columns: tuple[Tensor, ...] = ()
    measures: bool = False
    end: int | Tensor = 0


ALWAYS = Pace()
"""Every query as configured, and nothing to remember."""


def pace(attention: AttentionConfig, patterns: Patterns | None, facts: PassFacts) -> Pace:
    """Which factor on λ each query of a pass gets.

    Raises:
        SaliencyError: a training step without labels, or with a gate that measures; tokens or a cache are missing.
        PatchError: the logits that a gate measures do not pass by.
    """
    prompt_factor, thinking_factor, answer_factor = phases = attention.phases(facts.kind)
    even = prompt_factor == thinking_factor == answer_factor == 1.0
    if even and attention.gate is None and not facts.traced:
        return ALWAYS
    generated = _generated(facts, usual=phases != attention.phase_factors and attention.gate is None)
    before = _before(attention, patterns, facts)
    track = None if patterns is None else _read(before, patterns, facts)
    thinking = torch.zeros_like(generated) if track is None else track.thinking
    phase = torch.where(generated, torch.where(thinking, 1, 2), 0)
    factor = torch.where(generated, torch.where(thinking, thinking_factor, answer_factor), prompt_factor)
    gate = None
    if attention.gate is not None:
        _refuse_blind(attention.gate, facts)
        gate = gate_of(before, track, attention.gate, generated=generated)
        factor = factor * gate
    return Pace(
        factor=None if even and gate is None else factor,
        gate=gate,
        phase=phase,
        before=before,
        track=track,
        columns=_columns(facts),
        measures=facts.ends_prompt,
        end=facts.past + facts.queries,
    )


def gates_after(taken: Pace, attention: AttentionConfig, logits: Tensor | None) -> Gates | None:
    """What rides on the cache once the pass's logits `(rows, some queries, vocabulary)` are known; None where nobody sees them."""
    if taken.before is None:
        return None
    states: list[GateState] = []
    for place, column in enumerate(taken.columns):
        state = states[-1] if states else taken.before
        if taken.track is not None:
            state = state_after(state, taken.track, column)
        if attention.gate is not None and taken.measures and logits is not None:
            state = observe(state, logits_of(taken, logits, place), attention.gate)
        states.append(state)
    return Gates(tuple(states), taken.end)


def logits_of(taken: Pace, logits: Tensor, place: int) -> Tensor:
    """`(rows, vocabulary)` of one of the kept queries; the model may have made logits for the last queries only."""
    column = taken.columns[place].to(logits.device)
    if taken.phase is not None and logits.shape[1] == taken.phase.shape[1]:
        return logits[torch.arange(len(column), device=logits.device), column].detach()
    return logits[:, place - len(taken.columns)].detach()


def _generated(facts: PassFacts, *, usual: bool) -> Tensor:
    """`(rows, queries)` bool: queries out of which a token is generated.

    Inside `generate` these are all from the prompt's last on. In a forward pass of its own these are the positions before a
    label; without labels, the last real token of each row. In training that is refused where the configuration asks for them,
    and said where they are only what is `usual` for a kind of statement.
    """
    shape, device = (facts.rows, facts.queries), facts.device
    if facts.prompt_end is not None:
        return (facts.positions >= facts.prompt_end - 1).expand(shape)
    if facts.prompt is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if facts.prompt.labelled is not None:
        return facts.prompt.labelled.to(device)
    if facts.training and not usual:
        raise SaliencyError(
            "queries='generated' (or 'thinking', 'answer', a schedule, a gate) needs to know in training which tokens are "
            "generated, and no labels reached the patched model. Call it as model(..., labels=...) (PEFT and label smoothing "
            "take them out on the way), or use queries='all'."
        )
    return torch.zeros(shape, dtype=torch.bool, device=device).scatter(1, _last_real(facts)[:, None], True)


def _last_real(facts: PassFacts) -> Tensor:
    """`(rows,)` column of each row's last token that is no padding."""
    if facts.prompt is None or facts.prompt.real is None:
        return torch.full((facts.rows,), facts.queries - 1, device=facts.device)
    real = facts.prompt.real[:, -facts.queries :].to(facts.device)
    last = (real * torch.arange(1, facts.queries + 1, device=facts.device)).argmax(1)
    return last.repeat_interleave(facts.rows // len(last))


def _before(attention: AttentionConfig, patterns: Patterns | None, facts: PassFacts) -> GateState:
    """The state before the pass. A prompt measures anew; whether the text that it goes on with is a thought is remembered."""
    patterns = patterns or Patterns()
    state = fresh_state(facts.rows, patterns, attention.gate, facts.device)
    kept = None if facts.gates is None or not facts.cached else facts.gates.after(facts.past)
    if facts.prompt is None:
        return state if kept is None else kept
    ids, earlier = facts.prompt.ids, int(facts.past) - facts.prompt.first_position
    if ids is not None and earlier > 0:  # the conversation so far came along
        track = read_tokens(state, _without_padding(ids[:, :earlier], facts, facts.prompt.first_position), patterns)
        return state_after(state, track, torch.full((facts.rows,), earlier - 1, device=facts.device))
    if kept is not None and facts.past:
        return dataclasses.replace(state, tail=kept.tail, thinking=kept.thinking)
    return state


def _read(before: GateState, patterns: Patterns, facts: PassFacts) -> Track | None:
    if facts.tokens is None:
        if facts.prompt is not None and facts.prompt_end is not None:
            return None  # a prompt of embeddings: what is generated after it comes as tokens
        raise SaliencyError(
            "inputs_embeds came without input_ids, and think tags or phrases are read from tokens. Pass input_ids, or use "
            "queries='all' or 'generated' without a schedule or a gate that reads."
        )
    tokens = _without_padding(facts.tokens, facts, int(facts.past)) if facts.prompt is not None else facts.tokens.to(facts.device)
    said = None
    if facts.prompt_end is not None:  # a phrase in the prompt is not the model's
        said = (facts.positions >= facts.prompt_end).expand(tokens.shape)
    elif facts.prompt is not None and facts.prompt.labelled is not None:
        said = torch.nn.functional.pad(facts.prompt.labelled[:, :-1], (1, 0)).to(facts.device)
    return read_tokens(before, tokens, patterns, said=said)


def _without_padding(tokens: Tensor, facts: PassFacts, first: int) -> Tensor:
    """`(rows, tokens)` from key position `first` on, padding marked, rows repeated as for beams."""
    tokens = tokens.to(facts.device)
    real = None if facts.prompt is None else facts.prompt.real
    if real is not None:
        own = real[:, first : first + tokens.shape[1]].to(facts.device)  # drafted tokens come after it
        own = torch.nn.functional.pad(own, (0, tokens.shape[1] - own.shape[1]), value=True)
        tokens = torch.where(own.repeat_interleave(len(tokens) // len(own), 0), tokens, _PADDING)
    return tokens.repeat_interleave(facts.rows // len(tokens), 0)


def _refuse_blind(gate: GateConfig, facts: PassFacts) -> None:
    """A gate that would silently stay where it is."""
    if gate.row.measures is None:
        return
    kind = gate.kind
    if facts.training:
        raise SaliencyError(
            f"a {kind!r} gate opens by the distributions of earlier steps, which a training step does not have. Train with "
            "gate=None and set the gate afterwards."
        )
    if not facts.cached and facts.prompt_end is not None and facts.queries > facts.prompt_end:
        raise SaliencyError(f"a {kind!r} gate remembers on the cache what it measured; leave use_cache at True.")
    if not facts.watched:
        raise PatchError(
            f"a {kind!r} gate measures the logits of the patched model, and this call does not make them: call the model itself, "
            "not its decoder."
        )


def _columns(facts: PassFacts) -> tuple[Tensor, ...]:
    """The queries after which the state is kept: inside `generate` those that generate, of which drafts may be taken back."""
    if facts.prompt_end is None:
        return (_last_real(facts),)
    count = 1
    if facts.queries > 1 and facts.ends_prompt:
        count = min(facts.queries, int(facts.past) + facts.queries - facts.prompt_end + 1)
    first = torch.zeros(facts.rows, dtype=torch.long, device=facts.device)
    return tuple(first + column for column in range(facts.queries - count, facts.queries))
