"""The report on pointing at text: what chooses shares nothing with what is reported, and every condition does what it is called."""

from __future__ import annotations

import math

import pytest
import torch
from kit.gguf_files import FILE, write_gguf

from hf_steer.evidence.text import SPLITS, TASKS, Case, make_cases
from hf_steer.evidence.text.conditions import RANDOM_SETS, conditions, random_heads
from hf_steer.evidence.text.run import Answer, TextPointing
from hf_steer.patching import get_steer_status

GRAMMAR = {
    "a", "an", "and", "be", "by", "did", "do", "does", "for", "has", "have", "her", "his", "in", "is", "it", "its", "may", "me",
    "my", "not", "of", "on", "once", "or", "said", "that", "the", "they", "this", "to", "two", "use", "was", "were", "what", "when",
    "which", "who", "with", "word", "words", "your", "only", "easy", "letter", "letters", "capital", "one", "great", "question",
    "mark", "come", "comes", "stay", "before", "after",
}  # fmt: skip


def words_of(case: Case) -> set[str]:
    return {word.strip('.:?!",').lower() for word in case.text.split() if not word.strip('.:?!",').isdigit()}


@pytest.mark.parametrize("task", TASKS)
def test_what_chooses_shares_no_name_template_or_answer_with_the_report(task):
    choose, report = (set().union(*(words_of(case) for case in make_cases(task, split, 200, words=60))) for split in SPLITS)
    assert choose & report <= GRAMMAR
    assert len({case.text for case in make_cases(task, "report", 100, words=60)}) > 60
    assert make_cases(task, "report", 3) == make_cases(task, "report", 3) != make_cases(task, "report", 3, seed=1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_span_is_there_once_and_its_answer_is_right(task, split):
    for case in make_cases(task, split, 50, words=80):
        assert all(case.text.count(span) == 1 for span in case.spans)
        if task != "instruction":
            assert case.names(f"It is {case.answers[2]}, I think.") == 2
            assert case.is_right(case.answers[case.meant])
            assert not case.is_right(case.answers[case.meant - 1])
            assert case.names("Nobody knows.") is None


def test_instructions_are_checked_by_what_they_ask():
    said = {"lower": "dogs bark", "indeed": "Indeed", "bullets": "- a", "short": "Dogs.", "quoted": '"Dogs"', "exclaim": "Ha!"}
    for kind, text in said.items():
        case = Case("instruction", kind, "", ("x",), 0, (kind,))
        assert case.is_right(text)
        assert not case.is_right("Dogs are kind")


def test_what_repeats_itself_or_surprises_is_not_readable():
    assert Answer("The bowl is made of clay.", 0.5, 0.0).is_readable
    assert not Answer("the waiter the waiter the waiter", 0.5, 0.0).is_readable
    assert not Answer("The bowl is made of clay.", 5.0, 0.0).is_readable
    assert not Answer(" .", 0.5, 0.0).is_readable


def test_random_heads_are_as_many_as_were_found():
    found = {1: (0, 2), 3: (1,)}
    drawn = random_heads(found, (4, 3), seed=0)
    assert [len(own) for own in drawn.values()] == [RANDOM_SETS] * 2
    assert all({layer: len(heads) for layer, heads in own.items()} == {1: 2, 3: 1} for own in drawn["same layers"])
    assert all(sum(map(len, own.values())) == 3 for own in drawn["anywhere"])


@pytest.fixture(scope="module")
def pointing(tmp_path_factory):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_gguf(tmp_path_factory.mktemp("text"), tokens=2048)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return TextPointing(model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE), new_tokens=3, batch_tokens=400)


def test_every_condition_runs_and_leaves_the_model_as_it_was(pointing):
    config = pointing.model.config
    cases = make_cases("reports", "report", RANDOM_SETS)
    table = conditions((config.num_hidden_layers, config.num_attention_heads), {0: (0,)}, seed=0)
    rows = {name: pointing.row("reports", cases, condition) for name, condition in table.items()}
    assert not get_steer_status(pointing.model).patched
    assert rows["unsteered"].kl_nats == 0
    assert rows["default"].kl_nats > 0
    assert math.isnan(rows["prompt: said twice"].kl_nats)  # another prompt
    assert rows["all heads, λ = 3"].kl_nats > rows["all heads, λ = 0.5"].kl_nats
    assert len({rows[name].kl_nats for name in ("default", "wrong span", "shuffled", "uniform")}) == 4
    assert all(row.right + row.wrong + row.neither == pytest.approx(1) for row in rows.values())
