"""What a configuration leaves open is decided by what is said: its meaning does not depend on how much is pointed at."""

from __future__ import annotations

import warnings

import pytest
import torch
from kit.asking import cache_name, prompt
from kit.documents import ROOT
from kit.tiny import make_model, make_prompt

from hf_steer import AttentionConfig, Saliency, SaliencyConfig, SteerConfig, patch_model, unpatch_model, use_strength
from hf_steer.attention import say_once
from hf_steer.config.manners import MANNERS
from hf_steer.errors import SaliencyError


def logits(model, inputs, **said):
    with torch.no_grad():
        return model(**inputs, **said).logits


def span(inputs, start, end, score=1.0) -> Saliency:
    scores = torch.zeros(inputs["input_ids"].shape)
    scores[:, start:end] = score
    return Saliency.from_tokens(scores)


@pytest.mark.parametrize(("start", "end", "score"), [(2, 3, 1.0), (2, 9, 1.0), (2, 3, 0.01), (0, 12, 5.0)])
def test_the_odds_of_a_span_change_by_the_same_factor_whatever_its_size_and_unit(start, end, score):
    model, inputs = make_model("qwen2", "eager"), prompt(tokens=12)
    with torch.no_grad():
        before = model(**inputs, output_attentions=True).attentions[1]
        patch_model(model, AttentionConfig(heads={1: "all"}, saliency=SaliencyConfig(source=None)))
        after = model(**inputs, output_attentions=True, saliency=span(inputs, start, end, score)).attentions[1]
    change = (after / before).log()[0, :, -1]
    inside = change[:, start:end]
    torch.testing.assert_close(inside, inside[:, :1].expand_as(inside), rtol=1e-3, atol=1e-4)
    if end < 12:
        difference = inside[:, 0] - change[:, -1]
        torch.testing.assert_close(difference, torch.full_like(difference, MANNERS["tokens"].strength), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[0, :, :-1], before[0, :, :-1])  # the prompt is read as it is


def test_a_span_with_nothing_left_open_is_what_the_defaults_are():
    inputs = prompt(tokens=12, rows=2)
    said, manner = span(inputs, 3, 5), MANNERS["tokens"]
    model = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)))
    usual = logits(model, inputs, saliency=said)
    saliency = SaliencyConfig(source=None, normalize=manner.normalize, preserve_mass=manner.preserve_mass)
    spelled = AttentionConfig(strength=manner.strength, queries=manner.queries, saliency=saliency)
    assert AttentionConfig(saliency=SaliencyConfig(source=None)).spelled("tokens") == spelled
    assert torch.equal(logits(patch_model(unpatch_model(model), spelled), inputs, saliency=said), usual)


@pytest.mark.parametrize("kind", ["region", "source"])
def test_pictures_too(kind):
    inputs = make_prompt("qwen2_vl", [[3, ("image", 4, 3), 4], [2, ("image", 2, 3), 5]])
    said = {"saliency": Saliency.from_boxes((0, 0, 9, 9), (42, 56))} if kind == "region" else {}
    config = AttentionConfig(saliency=SaliencyConfig(source=None if kind == "region" else "vision_attention"))
    model = patch_model(make_model("qwen2_vl"), config)
    usual = logits(model, inputs, **said)
    spelled = config.spelled(kind)
    assert spelled.saliency.preserve_mass
    torch.testing.assert_close(logits(patch_model(unpatch_model(model), spelled), inputs, **said), usual)


def test_generation_and_its_cache_go_on_as_they_began():
    inputs = prompt(tokens=12, rows=2)
    said = span(inputs, 3, 5)
    model = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)))
    out = model.generate(**inputs, saliency=said, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                         return_dict_in_generate=True, output_logits=True, prefill_chunk_size=5)  # fmt: skip
    spelled = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)).spelled("tokens"))
    other = spelled.generate(**inputs, saliency=said, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                             return_dict_in_generate=True, output_logits=True)  # fmt: skip
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(other.logits), rtol=1e-4, atol=1e-5)


def test_a_strength_that_is_said_later_is_meant_as_it_is():
    inputs = prompt(tokens=12)
    said = span(inputs, 3, 5)
    model = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)))
    plain = patch_model(make_model("qwen2"), AttentionConfig(strength=4.0, saliency=SaliencyConfig(source=None)))
    with use_strength(model, 4.0):
        assert torch.equal(logits(model, inputs, saliency=said), logits(plain, inputs, saliency=said))
    with torch.no_grad():
        begun = model(**inputs, saliency=said, use_cache=True)
        cache = {cache_name(model): begun[cache_name(model)]}
        step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 13, dtype=torch.long)}
        with use_strength(model, MANNERS["tokens"].strength):
            told = model(**step, **cache).logits
        begun = model(**inputs, saliency=said, use_cache=True)
        usual = model(**step, **{cache_name(model): begun[cache_name(model)]}).logits
    torch.testing.assert_close(told, usual, rtol=1e-4, atol=1e-5)


def test_a_saved_configuration_of_the_first_schema_means_what_it_meant():
    old = {"schema_version": 1, "attention": {"heads": "all", "saliency": {"source": None}}, "aligners": []}
    loaded = SteerConfig.from_dict(old).attention
    assert loaded == AttentionConfig(strength=1.0, queries="all", saliency=SaliencyConfig(
        source=None, normalize="zscore", preserve_mass=False))  # fmt: skip
    assert SteerConfig.from_dict(SteerConfig.from_dict(old).to_dict()).attention == loaded
    said = SteerConfig.from_dict({"schema_version": 1, "attention": {"strength": 3.0, "queries": "answer"}}).attention
    assert (said.strength, said.queries, said.saliency.normalize) == (3.0, "answer", "zscore")


def test_the_page_says_what_is_left_open():
    page = (ROOT / "docs" / "heads-strength-when.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    kinds = ("text", "something", "seconds", "nothing")
    rows = [cells for cells in table if len(cells) == 5 and cells[0].startswith(kinds)]
    assert len(rows) == len(MANNERS)
    for cells, manner in zip(rows, MANNERS.values(), strict=True):
        assert float(cells[3]) == manner.strength
        assert cells[2].startswith("yes") == manner.preserve_mass
        assert ("generated" in cells[4]) == (manner.queries == "generated")


def test_a_pass_of_its_own_that_steers_one_query_says_so_once_and_what_is_said_outright_does_not():
    inputs = prompt(tokens=12)
    said = span(inputs, 3, 5)
    model = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)))
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="only the last token of each row is steered.*queries='all'"):
        logits(model, inputs, saliency=said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, inputs, saliency=said)  # said already
        say_once.cache_clear()
        logits(model, inputs)  # nothing is asked for
        logits(model, inputs, saliency=said, logits_to_keep=1)
        logits(model, inputs, saliency=said, labels=inputs["input_ids"])
        model.generate(**inputs, saliency=said, max_new_tokens=2)
        for queries in ("all", "generated"):
            patch_model(unpatch_model(model), AttentionConfig(saliency=SaliencyConfig(source=None), queries=queries))
            logits(model, inputs, saliency=said)


@pytest.mark.parametrize("graded", [True, False])
def test_in_training_a_pass_without_labels_steers_what_it_does_in_evaluation_and_says_so(graded):
    inputs = prompt(tokens=12)
    said = span(inputs, 3, 5)
    model = patch_model(make_model("qwen2"), AttentionConfig(saliency=SaliencyConfig(source=None)))
    expected = logits(model, inputs, saliency=said)
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="no labels reached it.*only the last token"), torch.set_grad_enabled(graded):
        found = model.train()(**inputs, saliency=said).logits
    torch.testing.assert_close(found, expected)
    patch_model(unpatch_model(model), AttentionConfig(saliency=SaliencyConfig(source=None), queries="generated"))
    with pytest.raises(SaliencyError, match="no labels reached the patched model"):  # what is asked for outright
        model(**inputs, saliency=said)
