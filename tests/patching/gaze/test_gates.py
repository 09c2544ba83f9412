"""Gates, phases and schedules: each query's factor on λ is worked out by hand, token by token, and the logits must be those of
one pass with just these factors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from kit.gates import CLOSE, HOLD, OPEN, WAIT, Words, gated
from kit.gazing import every, gaze, logits, looking, prompt_for
from kit.tiny import SEEING, make_model, make_prompt
from kit.versions import cache_of, cached
from transformers import LogitsProcessor

import hf_steer
from hf_steer import ConfigError, GateConfig, PatchError, SaliencyError, patch_model, trace_steering, unpatch_model
from hf_steer.gating import Patterns, fresh_state
from hf_steer.patching.gaze import hooks as gaze_hooks
from hf_steer.patching.gaze.memory import Gates
from hf_steer.patching.gaze.when import Pace

STEPS = 12
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
PHASES = {"queries": "all"}, {"queries": "thinking"}, {"queries": "answer"}, {"schedule": {"prompt": 0.5, "thinking": -1.0}}
SCRIPTS = [
    [5, OPEN, 6, 7, WAIT, 8, 9, 10, *CLOSE, 11, 12],
    [OPEN, 6, *HOLD, 8, 9, 10, *CLOSE, 11, WAIT, 12],
    [13, WAIT, OPEN, 84, 14, HOLD[1], 15, *HOLD, 16, *HOLD],
]
"""What the three rows are made to say: tags and phrases that straddle steps, phrases outside the thought, broken ones."""


class Say(LogitsProcessor):
    """Makes each row say its script; beams and repeated rows say their row's."""

    def __init__(self, scripts, length):
        self.scripts, self.length = scripts, length

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        copies = len(scores) // len(self.scripts)
        for row in range(len(scores)):
            forced[row, self.scripts[row // copies][input_ids.shape[1] - self.length]] = 0.0
        return forced


def run(model, inputs, statement, scripts=SCRIPTS, **kwargs):
    """Sequences and `(rows, steps, vocabulary)` raw logits of what the rows are made to say."""
    say = [Say(scripts, inputs["input_ids"].shape[1])] if scripts else []
    with looking(model, statement):
        out = model.generate(
            **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True, logits_processor=say,
            **{"max_new_tokens": STEPS, **kwargs},
        )
    return out.sequences, torch.stack(out.logits, 1), out


def ends_with(tokens, *patterns):
    return any(tuple(tokens[-len(pattern) :]) == tuple(pattern) for pattern in patterns)


def entropy_of(row):
    p = torch.softmax(row.double(), -1).tolist()
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def margin_of(row):
    first, second = sorted(torch.softmax(row.double(), -1).tolist())[-2:][::-1]
    return first - second


def by_hand(prompt, said, row_logits, attention):
    """Factor on λ of every query: the prompt's, then one per token that is said; the last of the prompt says the first."""
    schedule = {"prompt": 1.0, "thinking": 1.0, "answer": 1.0, **(attention.get("schedule") or {})}
    scope = attention.get("queries", "all")
    gate = attention.get("gate")
    tokens, thinking, factors = [], False, []
    opened, value, age, seen = False, 0.0 if gate is None else gate.initial, 10**9, []
    for place, token in enumerate(prompt + said[:-1]):
        tokens.append(token)
        if ends_with(tokens, (OPEN,)):
            thinking = True
        if ends_with(tokens, CLOSE):
            thinking = False
        step = place - len(prompt) + 1  # of the token that comes out of this query
        age += 1
        if step > 0 and thinking and ends_with(tokens, (WAIT,), (86,), HOLD, (88, 87)):
            age = 0
        phase = "prompt" if step < 0 else "thinking" if thinking else "answer"
        factor = schedule[phase]
        if (scope == "generated" and step < 0) or (scope in ("thinking", "answer") and phase != scope):
            factor = 0.0
        if gate is not None and gate.kind == "self_report":
            own = max(0.0, 1 - age / gate.hold_tokens) if gate.soft else float(age < gate.hold_tokens)
            factor *= own if step >= 0 else gate.initial
        elif gate is not None:
            if step >= 1:
                level, opens, closes = entropy_of(row_logits[step - 1]), gate.threshold, gate.release
                if gate.kind == "margin":
                    level, opens, closes = -margin_of(row_logits[step - 1]), -opens, -closes
                elif gate.zscore:
                    mean = sum(seen) / max(len(seen), 1)
                    spread = math.sqrt(sum((x - mean) ** 2 for x in seen) / max(len(seen), 1))
                    seen.append(level)
                    level = (level - mean) / spread if len(seen) > 4 else -math.inf
                opened = level >= opens or (opened and level >= closes)
                value = min(1.0, max(0.0, (level - closes) / (opens - closes))) if gate.soft else float(opened)
            factor *= value if step >= 0 else gate.initial
        factors.append(factor)
    return factors


def one_pass(family, implementation, inputs, sequences, factors, statement, monkeypatch):
    """Logits of the steps from one pass over all tokens with these factors, on an ungated model."""
    model = patch_model(make_model(family, implementation), gated(family, normalize="none", backend="mask"))
    width = sequences.shape[1] - 1
    table = torch.zeros(len(sequences), width)
    for row, own in enumerate(factors):
        table[row, -len(own) :] = torch.tensor(own)
    monkeypatch.setattr(gaze_hooks, "pace", lambda *_: Pace(factor=table))
    new = width - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(sequences), new, dtype=torch.long)], 1)
    whole = {**inputs, "input_ids": sequences[:, :-1], "attention_mask": mask}
    if family in SEEING:
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(len(sequences), new, dtype=torch.int)], 1)
        patch_model(unpatch_model(model), gated(family, backend="mask"))
    else:
        whole_scores = torch.zeros(len(sequences), width)
        whole_scores[:, : statement.shape[1]] = statement
        statement = hf_steer.Saliency.from_tokens(whole_scores)
    model.hf_steer.gaze.paces = True
    found = logits(model, whole, statement if family not in SEEING else None)
    monkeypatch.undo()
    return found[:, -new - 1 :]


def scaled(family, inputs):
    """The user's scores as they are used: the same in one pass and in many."""
    if family in SEEING:
        return None, None
    scores = torch.randn(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) * inputs["attention_mask"]
    return hf_steer.Saliency.from_tokens(scores), scores


def check(family, implementation, attention, monkeypatch, *, scripts=SCRIPTS, **kwargs):
    """Generate with the gate, and compare with one pass whose factors were worked out by hand."""
    inputs = prompt_for(family)
    statement, scores = scaled(family, inputs)
    normalize = {} if family in SEEING else {"normalize": "none"}
    model = patch_model(make_model(family, implementation), gated(family, **attention, **normalize), tokenizer=Words())
    with trace_steering(model) as trace:
        sequences, steps, _ = run(model, inputs, statement, scripts, **kwargs)
    factors = []
    for row in range(len(sequences)):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        said = sequences[row, inputs["input_ids"].shape[1] :].tolist()
        factors.append(by_hand(prompt, said, steps[row], attention))
        shown = [step.strength / 2.0 for step in trace.steps(row)]
        assert shown == pytest.approx(factors[-1][-len(shown) :], abs=1e-4)
        factors[-1][-len(shown) :] = shown  # a soft gate magnifies the rounding of logits, so these are what to compare with
        assert [step.entropy for step in trace.steps(row)] == pytest.approx([entropy_of(own) for own in steps[row]], abs=1e-4)
    expected = one_pass(family, implementation, inputs, sequences, factors, scores, monkeypatch)
    torch.testing.assert_close(steps, expected, **TOLERANCE)
    return factors


def thresholds(family, implementation, measure):
    """A gate that opens and closes on this model: around the median of what it measures when it is not steered."""
    inputs = prompt_for(family)
    _, steps, _ = run(make_model(family, implementation), inputs, None)
    values = sorted(measure(row) for rows in steps for row in rows)
    between = [(low + high) / 2 for low, high in itertools.pairwise(values)]  # never on a value: rounding would decide
    return between[len(between) // 2], between[len(between) // 3], between[2 * len(between) // 3]


@every
@pytest.mark.parametrize("attention", PHASES, ids=lambda a: str(*a.values()))
def test_scopes_and_schedules_follow_the_think_tags_of_each_row(family, implementation, attention, monkeypatch):
    factors = check(family, implementation, attention, monkeypatch)
    assert attention == PHASES[0] or all(len(set(own)) > 1 for own in factors)


@every
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["entropy", "margin", "self_report", "zscore"])
def test_gates_open_and_close_by_what_each_row_said_before(family, implementation, kind, soft, monkeypatch):
    if kind == "self_report":
        gate = GateConfig(kind=kind, phrases=("wait", "hold on"), hold_tokens=3, soft=soft)
    elif kind == "zscore":
        gate = GateConfig(zscore=True, threshold=0.8, release=-0.2, soft=soft)
    else:
        middle, low, high = thresholds(family, implementation, entropy_of if kind == "entropy" else margin_of)
        gate = GateConfig(kind=kind, threshold=middle, release=low if kind == "entropy" else high, soft=soft)
    factors = check(family, implementation, {"gate": gate}, monkeypatch)
    assert len({factor for own in factors for factor in own}) > (2 if soft else 1)
    assert factors[0] != factors[1]


def test_a_tag_in_the_prompt_counts_and_a_phrase_in_it_does_not():
    inputs = prompt_for("llama", rows=[[7]])
    inputs["input_ids"][0, -2:] = torch.tensor([OPEN, WAIT])
    statement, _ = scaled("llama", inputs)
    gate = GateConfig(kind="self_report", phrases=("wait",), hold_tokens=8)
    model = patch_model(make_model("llama"), gated("llama", gate=gate, normalize="none"), tokenizer=Words())
    with trace_steering(model) as trace:
        run(model, inputs, statement, [[5, 6, 7, WAIT, 8]], max_new_tokens=5)
    assert [step.phase for step in trace.steps()] == ["thinking"] * 5
    assert [step.gate for step in trace.steps()] == [0, 0, 0, 0, 1]


def test_gate_scope_and_schedule_multiply(monkeypatch):
    gate = GateConfig(kind="self_report", phrases=("wait", "hold on"), hold_tokens=4, initial=0.5)
    check("qwen2_vl", "sdpa", {"gate": gate, "schedule": {"prompt": 0.5, "thinking": 2.0}}, monkeypatch)
    check("llama", "sdpa", {"gate": gate, "queries": "thinking"}, monkeypatch)


@pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_static_caches_and_chunked_prompts_change_nothing(family, kwargs, monkeypatch):
    middle, low, _ = thresholds(family, "sdpa", entropy_of)
    check(family, "sdpa", {"gate": GateConfig(threshold=middle, release=low)}, monkeypatch, **kwargs)
    check(family, "sdpa", {"queries": "thinking"}, monkeypatch, **kwargs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
@pytest.mark.parametrize("kind", ["entropy", "self_report"])
def test_gates_follow_beams(family, kind, monkeypatch):
    """Each returned sequence is scored as one pass with the gates of its own tokens scores it."""
    inputs = prompt_for(family)
    statement, scores = scaled(family, inputs)
    normalize = {} if family in SEEING else {"normalize": "none"}
    gate = GateConfig(kind="self_report", phrases=("wait",), hold_tokens=2)
    if kind == "entropy":
        middle, low, _ = thresholds(family, "sdpa", entropy_of)
        gate = GateConfig(threshold=middle, release=low)
    model = patch_model(make_model(family), gated(family, gate=gate, **normalize), tokenizer=Words())
    favoured = {(OPEN,): 6.0, (WAIT,): 4.0}
    with trace_steering(model) as trace:
        sequences, steps, out = run(model, inputs, statement, None, num_beams=3, num_return_sequences=2, sequence_bias=favoured)
    length = inputs["input_ids"].shape[1]
    picked, factors, moved = [], [], 0
    for number, beams in enumerate(out.beam_indices):
        own = torch.stack([steps[int(beam), step] for step, beam in enumerate(beams) if beam >= 0])
        moved += len(set(beams.tolist())) > 1
        prompt = inputs["input_ids"][number // 2][inputs["attention_mask"][number // 2].bool()].tolist()
        picked.append(own)
        factors.append(by_hand(prompt, sequences[number, length:].tolist(), own, {"gate": gate}))
        shown = [step.gate for step in trace.steps(number, beams=out.beam_indices)]
        assert shown == pytest.approx(factors[-1][-len(shown) :], abs=1e-4)
    assert moved  # beams did change places
    assert len({tuple(own) for own in factors}) > 1
    rows = [number // 2 for number in range(len(sequences))]
    repeated = {name: value[rows] for name, value in inputs.items() if name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if family in SEEING:
        repeated |= doubled_pictures(inputs)
    expected = one_pass(family, "sdpa", repeated, sequences, factors, None if scores is None else scores[rows], monkeypatch)
    torch.testing.assert_close(torch.stack(picked), expected, **TOLERANCE)


def doubled_pictures(inputs):
    """Every row twice: row 0 of `prompt_for` has two pictures, row 2 one."""
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    one, two, three = inputs["pixel_values"].split(sizes)
    order = [0, 1, 0, 1, 2, 2]
    return {"pixel_values": torch.cat([one, two, one, two, three, three]), "image_grid_thw": inputs["image_grid_thw"][order]}


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_drafts_that_are_taken_back_leave_the_gate_where_it_was(family):
    inputs = prompt_for(family, rows=[[4, ("image", 2, 3), 5]])
    statement, _ = scaled(family, inputs)
    normalize = {} if family in SEEING else {"normalize": "none"}
    gate = GateConfig(kind="self_report", phrases=("wait",), hold_tokens=3)
    model = patch_model(make_model(family), gated(family, gate=gate, **normalize), tokenizer=Words())
    favoured = {(OPEN,): 8.0, (WAIT,): 7.0}
    greedy, _, _ = run(model, inputs, statement, None, sequence_bias=favoured)
    drafted, _, _ = run(model, inputs, statement, None, sequence_bias=favoured, prompt_lookup_num_tokens=3)
    assert {OPEN, WAIT} <= set(greedy[0].tolist())
    assert torch.equal(drafted, greedy)


def test_a_pass_goes_on_from_the_last_token_that_was_not_taken_back():
    rows = torch.arange(3)
    states = [dataclasses.replace(fresh_state(3, Patterns(), None, rows.device), age=rows + 10 * step) for step in range(4)]
    gates = Gates(tuple(states), end=20)
    for taken_back, state in enumerate(reversed(states)):
        assert gates.after(20 - taken_back) is state
    assert [state.age.tolist() for state in gates.select(torch.tensor([2, 2, 0])).history] == [
        [10 * step + 2, 10 * step + 2, 10 * step] for step in range(4)
    ]


@pytest.mark.parametrize("steered_first", [True, False])
def test_a_second_turn_on_the_same_cache_reads_the_tags_of_the_whole_conversation(steered_first):
    """The thought was opened in the first turn's answer and is still open, whether or not that turn was steered."""
    model = patch_model(make_model("llama"), gated("llama", queries="thinking", normalize="none"), tokenizer=Words())
    first = make_prompt("llama", [[9]])
    scores = torch.randn(1, 40)
    with looking(model, hf_steer.Saliency.from_tokens(scores[:, :9])) if steered_first else hf_steer.disable_steering(model):
        said = model.generate(
            **first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, logits_processor=[Say([[3, OPEN, 4, 5]], 9)]
        )
    ids = torch.cat([said.sequences, torch.tensor([[6, 7]])], 1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for cache in (cache_of(said), None):
        with looking(model, hf_steer.Saliency.from_tokens(scores[:, : ids.shape[1]])), trace_steering(model) as trace:
            out = model.generate(
                **whole, **cached(cache), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        assert [step.phase for step in trace.steps()] == ["thinking"] * 3
        found.append(torch.stack(out.logits, 1))
    assert found[0].shape == found[1].shape


def test_generation_without_a_cache_follows_tags_and_refuses_a_gate_that_has_to_remember():
    inputs = prompt_for("llama", rows=[[7]])
    statement, _ = scaled("llama", inputs)
    model = patch_model(make_model("llama"), gated("llama", queries="thinking", normalize="none"), tokenizer=Words())
    script = [SCRIPTS[0]]
    cached, uncached = (run(model, inputs, statement, script, use_cache=use)[1] for use in (True, False))
    torch.testing.assert_close(cached, uncached, **TOLERANCE)
    patch_model(unpatch_model(model), gated("llama", gate=GateConfig(), normalize="none"))
    with pytest.raises(SaliencyError, match="leave use_cache at True"):
        run(model, inputs, statement, script, use_cache=False)


@every
def test_a_closed_gate_and_a_zero_schedule_equal_no_steering(family, implementation):
    inputs = prompt_for(family)
    statement = gaze(family, inputs)
    model = make_model(family, implementation)
    _, plain, _ = run(model, inputs, None)
    for attention in ({"gate": GateConfig(threshold=1.0)}, {"schedule": {"prompt": 0.0, "thinking": 0.0, "answer": 0.0}}):
        patch_model(model, gated(family, **attention), tokenizer=Words())
        torch.testing.assert_close(run(model, inputs, statement)[1], plain, **TOLERANCE)
        unpatch_model(model)


def test_in_training_the_phases_come_from_the_labels(monkeypatch):
    model = make_model("llama").train()
    inputs = make_prompt("llama", [[8], [11]], padding="right")
    for row, script in enumerate(SCRIPTS[:2]):
        inputs["input_ids"][row, 1:5] = torch.tensor(script[:4])
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100
    labels[inputs["attention_mask"] == 0] = -100
    statement, _ = scaled("llama", inputs)
    patch_model(model, gated("llama", queries="thinking", normalize="none"), tokenizer=Words())
    with looking(model, statement):
        steered = model(**inputs, labels=labels).logits
    wanted = torch.zeros(inputs["input_ids"].shape)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        thinking = False
        for place, token in enumerate(ids[:-1]):
            thinking = (thinking or token == OPEN) and tuple(ids[max(0, place - 1) : place + 1]) != CLOSE
            wanted[row, place] = float(thinking and labels[row, place + 1] != -100)
    assert 0 < wanted.sum() < wanted.numel()
    patch_model(unpatch_model(model), gated("llama", normalize="none"))
    model.hf_steer.gaze.paces = True
    monkeypatch.setattr(gaze_hooks, "pace", lambda *_: Pace(factor=wanted))
    with looking(model, statement):
        torch.testing.assert_close(model(**inputs, labels=labels).logits, steered, **TOLERANCE)
    monkeypatch.undo()
    patch_model(unpatch_model(model), gated("llama", gate=GateConfig(), normalize="none"))
    with looking(model, statement), pytest.raises(SaliencyError, match="a training step does not have"):
        model(**inputs, labels=labels)
    patch_model(unpatch_model(model), gated("llama", queries="answer", normalize="none"), tokenizer=Words())
    with looking(model, statement), pytest.raises(SaliencyError, match="no labels reached the patched model"):
        model(**inputs)


def test_a_gate_that_cannot_see_logits_or_tokens_says_so():
    inputs = prompt_for("llama", rows=[[7]])
    statement, _ = scaled("llama", inputs)
    model = patch_model(make_model("llama"), gated("llama", gate=GateConfig(), normalize="none"))
    with looking(model, statement), pytest.raises(PatchError, match="call the model itself"):
        model.model(**inputs)
    patch_model(unpatch_model(model), gated("llama", queries="thinking", normalize="none"), tokenizer=Words())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with looking(model, statement), pytest.raises(SaliencyError, match="read from tokens"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_a_model_without_a_head_says_nothing_that_a_gate_could_follow():
    from transformers import Qwen3Model

    model = Qwen3Model(make_model("qwen3").config).eval()
    inputs = prompt_for("qwen3", rows=[[7]])
    patch_model(model, gated("qwen3", queries="thinking", normalize="none"), tokenizer=Words())
    with looking(model, scaled("qwen3", inputs)[0]), pytest.raises(PatchError, match="no language-modelling head"):
        model(**inputs)
    patch_model(unpatch_model(model), gated("qwen3", queries="generated", normalize="none"))
    with looking(model, scaled("qwen3", inputs)[0]), torch.no_grad():
        steered = model(**inputs).last_hidden_state
        with hf_steer.disable_steering(model):
            plain = model(**inputs).last_hidden_state
    torch.testing.assert_close(steered[:, :-1], plain[:, :-1], **TOLERANCE)
    assert not torch.equal(steered[:, -1], plain[:, -1])


def test_saved_gates_load_with_the_models_own_tokenizer(tmp_path):
    from hf_steer.embedded import embedded_model_dir

    gate = GateConfig(kind="self_report", phrases=("digit",), hold_tokens=2)
    attention = hf_steer.AttentionConfig(strength=2.0, gate=gate, schedule={"thinking": 0.5})
    config = hf_steer.SteerConfig(attention=attention)
    config.save_pretrained(tmp_path)
    model = hf_steer.from_pretrained(embedded_model_dir(), steer_config=tmp_path)
    assert model.hf_steer.plan.config.attention == attention
    assert model.hf_steer.plan.patterns.phrases
    assert copy.deepcopy(model).hf_steer.plan.patterns == model.hf_steer.plan.patterns
    with pytest.raises(ConfigError, match="cannot write 'naïve'"):
        hf_steer.from_pretrained(
            embedded_model_dir(), steer_config=hf_steer.SteerConfig(
                attention=hf_steer.AttentionConfig(gate=GateConfig(kind="self_report", phrases=("naïve",)))
            ), tokenizer=Words(),
        )
    plain = make_model("llama")
    with pytest.raises(ConfigError, match=r"tokenizer=tokenizer"):
        patch_model(plain, gated("llama", queries="answer"))
    assert not hf_steer.get_steer_status(plain).patched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "doubt"}, "gate.kind must be one of 'entropy', 'margin', 'self_report'"),
        ({"threshold": 1.5}, r"gate.threshold of a 'entropy' gate must lie in \[0, 1\]; got 1.5"),
        ({"threshold": 0.2, "release": 0.4}, "must lie below gate.threshold=0.2"),
        ({"kind": "margin", "threshold": 0.4, "release": 0.2}, "must lie above gate.threshold=0.4"),
        ({"threshold": 0.2, "soft": True}, "for a soft gate, which ramps between them"),
        ({"kind": "margin", "zscore": True}, "gate.zscore is of entropy gates"),
        ({"phrases": ("wait",)}, "a 'entropy' gate has no phrases; it has threshold, release"),
        ({"kind": "self_report", "threshold": 0.3}, "a 'self_report' gate has no threshold; it has phrases, hold_tokens"),
        ({"kind": "self_report", "phrases": ("", "wait")}, "must be non-empty strings"),
        ({"kind": "self_report", "hold_tokens": 0}, "gate.hold_tokens must be a whole number of at least 1"),
        ({"initial": 2.0}, r"gate.initial must lie in \[0, 1\]"),
    ],
)
def test_gates_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        GateConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "thoughts"}, "attention.queries must be one of 'auto', 'all', 'generated', 'thinking', 'answer'"),
        ({"schedule": {"end": 1.0}}, "must map some of prompt, thinking, answer to factors"),
        ({"schedule": {"prompt": float("nan")}}, "attention.schedule of prompt must be a finite number"),
        ({"schedule": {"prompt": 0.0}, "queries": "answer"}, "leave queries out"),
        ({"gate": 0.5}, "attention.gate must be a GateConfig or None"),
        ({"think_tags": ("<think>",)}, "must be two different strings"),
    ],
)
def test_phases_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hf_steer.AttentionConfig(**arguments)


def test_traces_of_rows_that_are_not_there_are_refused():
    model = patch_model(make_model("llama"), gated("llama"))
    with trace_steering(model) as trace:
        pass
    with pytest.raises(SaliencyError, match="no row 0 in this trace; it has 0"):
        trace.steps()
