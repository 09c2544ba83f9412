"""A patched model in lm-evaluation-harness: every document steered where it points, whatever batch it lands in."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from kit.gguf_files import FILE, write_gguf

from hf_steer import AttentionConfig, ConfigError, SaliencyConfig, SteerConfig, patch_model, unpatch_model
from hf_steer.harness.compare import TASKS, Score, compare, write_scores
from hf_steer.harness.looks import Together, look_of, runs_of
from hf_steer.saliency import Saliency

GAZE = AttentionConfig(heads="all", strength=3.0, saliency=SaliencyConfig(source=None, normalize="none"))


def test_documents_that_read_the_same_and_point_elsewhere_do_not_run_together():
    contexts = ["a b", "a b", "c", "a b", "d"]
    looks = [("a",), ("b",), ("c",), ("a",), ()]
    assert runs_of(contexts, looks) == [
        Together((4,), None), Together((0, 2, 3), {"a b": ("a",), "c": ("c",)}), Together((1,), {"a b": ("b",)}),
    ]  # fmt: skip
    assert runs_of([], []) == []


def test_a_look_is_a_stretch_or_a_list_of_them():
    for document, look in (({"look": "a"}, ("a",)), ({"look": ["a", "b"]}, ("a", "b")), ({"look": []}, ()), ({}, ()), ("text", ())):
        assert look_of(document) == look
    for wrong in (3, [3], [""]):
        with pytest.raises(ConfigError, match="'look' of a document"):
            look_of({"look": wrong})


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from hf_steer.harness import model

    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("gguf")
    steering = tmp_path_factory.mktemp("steering")
    SteerConfig(attention=GAZE).save_pretrained(steering)
    return write_gguf(tmp_path_factory.mktemp("model"), tokens=512), steering


@pytest.fixture(scope="module")
def lm(harness, folders):
    return harness.SteeredLM(str(folders[0]), str(folders[1]), gguf_file=FILE, device="cpu", dtype="float32", batch_size=3)


def requests(kind="loglikelihood"):
    from lm_eval.api.instance import Instance

    documents = [
        ("hold that thought", " now", "that"), ("hold that thought", " now", "thought"), ("hold that thought", " or never", "that"),
        ("the cat sat", " on the mat", ["the", "sat"]), ("a plain one", " here", None), ("the cat sat", " down", ["the", "sat"]),
    ]  # fmt: skip
    for number, (context, continuation, look) in enumerate(documents):
        end = continuation if kind == "loglikelihood" else {"until": ["never said"], "max_gen_toks": 5}
        yield Instance(kind, {"look": look}, (context, end), number)


def alone(lm, context, continuation, look):
    """Log-likelihood by one pass of the model, without the harness."""
    ids, end = lm.tokenizer(context)["input_ids"], lm.tokenizer(continuation)["input_ids"]
    row = torch.tensor([ids + end])
    said = {}
    if look:
        scores = Saliency.from_text([[look] if isinstance(look, str) else look], lm.tokenizer, torch.tensor([ids])).tokens
        said = {"saliency": Saliency.from_tokens(torch.cat([scores, torch.zeros(1, len(end))], 1))}
    labels = torch.tensor([[-100] * len(ids) + end])
    with torch.no_grad():
        logits = torch.log_softmax(lm.model(row, labels=labels, **said).logits[0, len(ids) - 1 : -1], -1)
    return logits.gather(1, torch.tensor(end)[:, None]).sum().item()


def test_each_document_is_steered_by_its_own_look(lm):
    found = [value for value, _ in lm.loglikelihood(list(requests()), disable_tqdm=True)]
    wanted = [alone(lm, *request.args, request.doc["look"]) for request in requests()]
    assert found == pytest.approx(wanted, abs=1e-4)
    plain = [alone(lm, *request.args, None) for request in requests()]
    apart = [abs(one - other) > 1e-3 for one, other in zip(found, plain, strict=True)]
    assert apart == [True, True, True, True, False, True]
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_documents_without_a_look_and_all_where_it_does_not_steer_are_the_plain_models(harness, lm):
    lm.steers = False
    off = lm.loglikelihood(list(requests()), disable_tqdm=True)
    lm.steers = True
    on = lm.loglikelihood([each for each in requests() if not each.doc["look"]], disable_tqdm=True)
    base = harness.unpatched(lm)
    theirs = base.loglikelihood(list(requests()), disable_tqdm=True)
    assert off == theirs
    assert on == [theirs[4]]


def test_what_is_generated_follows_the_look_of_its_own_row(lm):
    asked = list(requests("generate_until"))
    together = lm.generate_until(asked, disable_tqdm=True)
    one_by_one = [lm.generate_until([each], disable_tqdm=True)[0] for each in asked]
    assert together == one_by_one
    lm.steers = False
    assert lm.generate_until(asked, disable_tqdm=True) != together
    lm.steers = True


def test_a_look_that_is_not_in_the_prompt_and_trial_batches_are_errors(harness, lm, folders):
    from lm_eval.api.instance import Instance

    from hf_steer import SaliencyError

    with pytest.raises(SaliencyError, match="'nowhere' is not in its text"):
        lm.loglikelihood([Instance("loglikelihood", {"look": "nowhere"}, ("some text", " end"), 0)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="batch_size must be a number; got 'auto'"):
        harness.SteeredLM(str(folders[0]), str(folders[1]), gguf_file=FILE, batch_size="auto")
    long = Instance("loglikelihood", {"look": "start"}, ("start" + " and on" * lm.max_length, " end"), 0)
    with pytest.raises(ConfigError, match="what is pointed at lies before the last .* larger max_length"):
        lm.loglikelihood([long], disable_tqdm=True)


def test_our_tasks_run_steered_and_plain_under_the_registered_name(lm, tmp_path):
    from lm_eval.api.registry import get_model

    assert get_model("hf-steer") is type(lm)
    scores = compare(lm, limit=4)
    assert [(score.task, score.steered, score.documents) for score in scores] == [
        (task, steers, 4) for steers in (False, True) for task in ("hf_steer_reports", "hf_steer_ability")
    ]
    assert all(0 <= score.accuracy <= 1 for score in scores)
    with write_scores(scores, tmp_path).open(newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == [score.task for score in scores]


def test_the_tasks_are_whole():
    pytest.importorskip("datasets")
    from hf_steer.harness.tasks import documents

    reports, ability = documents.reports()["test"], documents.ability()["test"]
    assert len(reports) == documents.COUNT
    assert all(row["look"][0] in row["text"] and row["choices"][row["meant"]] in row["look"][0] for row in reports)
    assert all(len(set(row["choices"])) == 4 and row["look"] == [row["question"]] for row in ability)
    assert len({row["question"] for row in ability}) == len(ability) > 100
    assert sorted(path.name for path in TASKS.glob("*.yaml")) == ["hf_steer_ability.yaml", "hf_steer_reports.yaml"]
    assert Score("task", True, 0.5, 0.1, 4).steered


@pytest.mark.parametrize("queries", ["all", "generated", "auto"])
def test_answers_are_scored_with_the_queries_steered_that_the_configuration_says(lm, queries):
    patch_model(unpatch_model(lm.model), dataclasses.replace(GAZE, queries=queries))
    found = [value for value, _ in lm.loglikelihood(list(requests()), disable_tqdm=True)]
    assert found == pytest.approx([alone(lm, *request.args, request.doc["look"]) for request in requests()], abs=1e-4)
    patch_model(unpatch_model(lm.model), dataclasses.replace(GAZE, queries="all" if queries != "all" else "generated"))
    other = [value for value, _ in lm.loglikelihood(list(requests()), disable_tqdm=True)]
    assert [abs(one - another) > 1e-3 for one, another in zip(found, other, strict=True)] == [True] * 4 + [False, True]
    patch_model(unpatch_model(lm.model), GAZE)
