"""Models whose attention looks no attention function up are steered through the mask that they add to their logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kit.tiny_masked import HEADS, LAYERS, MASKED, PAIRS, SHIFTED, SoftmaxOracle, make_masked, prompt_of, words_of
from kit.versions import RELEASE, cache_of, cached

from hf_steer import (
    AttentionConfig,
    ConfigError,
    PatchError,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    disable_steering,
    patch_model,
    unpatch_model,
    use_saliency,
)
from hf_steer.errors import say_once
from hf_steer.families import resolve
from hf_steer.patching import probe_attention
from hf_steer.testing import check_family

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""MPT and Falcon add three terms to their logits, in another order than the oracle."""
STRENGTHS = [[1.5, -0.5, 0.0, 1.0], [-1.0, 2.0, 0.75, 0.5]]
every = pytest.mark.parametrize("kind", MASKED)


def steer(**attention):
    strength = {layer: dict(enumerate(values)) for layer, values in enumerate(STRENGTHS)}
    said = {"strength": strength, "saliency": SaliencyConfig(source=None, normalize="none"), **attention}
    return SteerConfig(attention=AttentionConfig(heads=dict.fromkeys(range(LAYERS), "all"), **{"queries": "all", **said}))


def scores_for(inputs, seed=1):
    words = words_of(inputs)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask", torch.ones_like(words)))
    return torch.randn(words.shape, generator=torch.Generator().manual_seed(seed)) * mask


@torch.no_grad()
def biased(model, inputs, scores, keys):
    """Of a model that is not patched."""
    with SoftmaxOracle(STRENGTHS, scores, keys) as oracle:
        output = model(**inputs)
    assert oracle.count == LAYERS
    return output


def real(logits, inputs):
    return logits[inputs.get("decoder_attention_mask", inputs.get("attention_mask")).bool()]


@every
@torch.no_grad()
def test_a_prompt_is_steered_as_if_the_bias_were_added_before_each_softmax(kind):
    model, inputs = make_masked(kind), prompt_of(kind)
    scores, words = scores_for(inputs), words_of(inputs)
    plain, expected = model(**inputs).logits, biased(model, inputs, scores, words.shape[1]).logits
    patch_model(model, steer())
    found = model(**inputs, saliency=Saliency.from_tokens(scores)).logits
    torch.testing.assert_close(real(found, inputs), real(expected, inputs), **CLOSE)
    assert (real(found, inputs) - real(plain, inputs)).abs().max() > 0.05
    assert torch.equal(model(**inputs).logits, plain)


@every
@torch.no_grad()
def test_steps_on_a_cache_are_steered_too(kind):
    model, inputs = make_masked(kind), prompt_of(kind, (8, 8))
    name = "decoder_input_ids" if kind in PAIRS else "input_ids"
    first = {key: value for key, value in inputs.items() if not key.endswith("attention_mask")} | {"use_cache": True}
    scores, step = scores_for(inputs), {**first, name: words_of(inputs)[:, -1:] + 1}
    expected = biased(model, step | cached(cache_of(biased(model, first, scores, 8))), scores, 9).logits
    patch_model(model, steer())
    cache = cache_of(model(**first, saliency=Saliency.from_tokens(scores)))
    torch.testing.assert_close(model(**step, **cached(cache)).logits, expected, **CLOSE)
    with disable_steering(model):
        unsteered = model(**step, **cached(cache_of(model(**first)))).logits
    assert (unsteered - expected).abs().max() > 0.05


@every
@torch.no_grad()
def test_undoing_leaves_no_hook_and_the_same_bits(kind):
    model, inputs = make_masked(kind), prompt_of(kind)
    plain, hooks = model(**inputs).logits, hooks_of(model)
    patch_model(model, steer())
    assert len(hooks_of(model)) > len(hooks)
    model(**inputs, saliency=Saliency.from_tokens(scores_for(inputs)))
    unpatch_model(model)
    assert hooks_of(model) == hooks
    assert torch.equal(model(**inputs).logits, plain)


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@pytest.mark.parametrize("kind", ["falcon", "falcon_alibi", "falcon_new"])
@torch.no_grad()
def test_falcon_is_steered_through_the_masks_of_sdpa(kind):
    model, inputs = make_masked(kind, "sdpa"), prompt_of(kind)
    scores = scores_for(inputs)
    expected = biased(model, inputs, scores, 10).logits
    patch_model(model, steer())
    found = model(**inputs, saliency=Saliency.from_tokens(scores)).logits
    torch.testing.assert_close(real(found, inputs), real(expected, inputs), **CLOSE)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "falcon_alibi", "mpt", "xglm", "gpt_neo"])
def test_beams_are_a_repeated_batch(kind):
    model, inputs = patch_model(make_masked(kind), steer()), prompt_of(kind, (9, 9))
    scores = scores_for(inputs)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with use_saliency(model, Saliency.from_tokens(scores)):
        beams = model.generate(**inputs, **settings, num_beams=3, num_return_sequences=3)
    twice = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    with use_saliency(model, Saliency.from_tokens(scores.repeat_interleave(2, 0))):
        repeated = model.generate(**twice, **settings, num_beams=3, num_return_sequences=3)
    assert torch.equal(beams[:3], repeated[:3])
    assert torch.equal(beams[3:], repeated[6:9])


STATIC = ["falcon", "mpt", "gpt_neox_japanese", "xglm", *(["bloom"] if RELEASE >= (5, 23) else [])]


@pytest.mark.parametrize("kind", STATIC)
def test_a_static_cache_gives_the_same_words(kind):
    model, inputs = patch_model(make_masked(kind), steer()), prompt_of(kind, (9, 9))
    said = Saliency.from_tokens(scores_for(inputs))
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings["disable_compile"] = True
    plain = model.generate(**inputs, **settings, cache_implementation="static").logits
    dynamic = model.generate(**inputs, **settings, saliency=said).logits
    static = model.generate(**inputs, **settings, saliency=said, cache_implementation="static").logits
    assert not torch.equal(static[0], plain[0])
    for one, other in zip(static, dynamic, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("kind", sorted(set(MASKED) - set(SHIFTED)))
@torch.no_grad()
def test_more_padding_changes_nothing(kind):
    model, inputs = patch_model(make_masked(kind), steer()), prompt_of(kind)
    scores = scores_for(inputs)
    longer = {name: torch.nn.functional.pad(value, (3, 0)) for name, value in inputs.items()}
    found = model(**inputs, saliency=Saliency.from_tokens(scores)).logits
    padded = model(**longer, saliency=Saliency.from_tokens(torch.nn.functional.pad(scores, (3, 0)))).logits[:, 3:]
    torch.testing.assert_close(real(padded, inputs), real(found, inputs), **CLOSE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", ["bloom", "mpt", "xglm"])
@torch.no_grad()
def test_a_copy_is_steered_by_itself(kind, how):
    model, inputs = patch_model(make_masked(kind), steer()), prompt_of(kind)
    said = Saliency.from_tokens(scores_for(inputs))
    other = how(model)
    expected, plain = model(**inputs, saliency=said).logits, unpatch_model(model)(**inputs).logits
    assert torch.equal(other(**inputs, saliency=said).logits, expected)
    assert torch.equal(unpatch_model(other)(**inputs).logits, plain)
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "xglm", "prophetnet"])
def test_strengths_are_learned_through_the_mask(kind):
    config = steer(strength="trainable")
    model, inputs = patch_model(make_masked(kind), config), prompt_of(kind)
    logits = model(**inputs, saliency=Saliency.from_tokens(scores_for(inputs))).logits
    real(logits, inputs).square().mean().backward()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == LAYERS
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in learned)


@pytest.mark.parametrize("kind", ["bloom", "falcon_alibi", "mpt", "xglm"])
def test_the_whole_contract_holds(kind):
    inputs = prompt_of(kind)
    report = check_family(make_masked(kind), inputs)
    assert report.passed, str(report)
    skipped = {check.name for check in report.checks if check.passed is None}
    assert not skipped & {"oracle", "padding", "decoding", "beams"} or kind == "xglm"


SOURCE = 12
READS = {"led": {}, "mvp": {}, "trocr": {}, "roformer": {"add_cross_attention": True}}


def reading(kind):
    """A model that reads an encoder, and a prompt of its decoder with what is read."""
    inputs = prompt_of(kind)
    if kind in PAIRS:
        model, words = make_masked(kind), inputs.pop("input_ids")
        with torch.no_grad():
            return model, inputs | {"encoder_outputs": model.get_encoder()(words)}, words.shape[1]
    states = torch.randn(2, SOURCE, 32, generator=torch.Generator().manual_seed(4))
    return make_masked(kind, **READS[kind]), {**inputs, "encoder_hidden_states": states}, SOURCE


@pytest.mark.parametrize("kind", [kind for kind in READS if kind in MASKED])
@torch.no_grad()
def test_what_an_encoder_hands_on_is_looked_at_too(kind):
    model, inputs, places = reading(kind)
    scores = torch.randn(2, places, generator=torch.Generator().manual_seed(5))
    plain, expected = model(**inputs).logits, biased(model, inputs, scores, places).logits
    patch_model(model, steer(attends="cross"))
    found = model(**inputs, saliency=Saliency.from_tokens(scores))
    torch.testing.assert_close(real(found.logits, inputs), real(expected, inputs), **CLOSE)
    assert (real(found.logits, inputs) - real(plain, inputs)).abs().max() > 0.05
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("kind", ["mvp", "trocr"])
@torch.no_grad()
def test_steps_look_at_what_an_encoder_handed_on(kind):
    model, inputs, places = reading(kind)
    name = "decoder_input_ids" if kind in PAIRS else "input_ids"
    first = {key: value for key, value in inputs.items() if not key.endswith("attention_mask")} | {"use_cache": True}
    scores, step = torch.randn(2, places, generator=torch.Generator().manual_seed(5)), {**first, name: first[name][:, -1:] + 1}
    expected = biased(model, step | cached(cache_of(biased(model, first, scores, places))), scores, places).logits
    patch_model(model, steer(attends="cross"))
    cache = cache_of(model(**first, saliency=Saliency.from_tokens(scores)))
    torch.testing.assert_close(model(**step, **cached(cache)).logits, expected, **CLOSE)
    unpatch_model(model)
    assert (model(**step, **cached(cache_of(model(**first)))).logits - expected).abs().max() > 0.01


def test_cross_attention_that_cannot_be_told_says_why():
    model = make_masked("prophetnet", add_cross_attention=True)
    with pytest.raises(ConfigError, match=r"cross_attn: it takes no mask with a layer per head"):
        patch_model(model, steer(attends="cross"))


def test_only_the_steered_layers_have_a_hook_and_all_heads_but_one_stay():
    model, inputs = make_masked("bloom"), prompt_of("bloom")
    scores = scores_for(inputs)
    config = AttentionConfig(heads={1: (2,)}, strength=3.0, saliency=SaliencyConfig(source=None, normalize="none"))
    patch_model(model, SteerConfig(attention=config))
    first, second = (site.module for site in resolve(model).layers)
    assert not first._forward_pre_hooks
    assert len(second._forward_pre_hooks) == 1
    found = []
    second.register_forward_pre_hook(lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True)
    model(**inputs, saliency=Saliency.from_tokens(scores))
    model(**inputs)
    changed = found[0] - found[1]
    assert found[0].shape[1] == HEADS
    assert not changed[:, [0, 1, 3]].any()
    torch.testing.assert_close(changed[0, 2, -1], 3 * scores[0])


def test_gradient_checkpointing_is_refused():
    model, inputs = patch_model(make_masked("bloom"), steer()), prompt_of("bloom")
    model.train()
    model.transformer.gradient_checkpointing = True
    with pytest.raises(PatchError, match="gradient_checkpointing_disable"):
        model(**inputs, saliency=Saliency.from_tokens(scores_for(inputs)))


def test_a_hook_that_was_removed_is_missed():
    model, inputs = patch_model(make_masked("bloom"), steer()), prompt_of("bloom")
    model.transformer.h[1].self_attention._forward_pre_hooks.clear()
    model(**inputs)
    with pytest.raises(PatchError, match=r"layers \[1\] were to be steered in this pass and were not"):
        model(**inputs, saliency=Saliency.from_tokens(scores_for(inputs)))


def test_a_layer_that_runs_outside_of_a_pass_says_so():
    model, inputs = patch_model(make_masked("bloom"), steer()), prompt_of("bloom")
    states, mask = torch.randn(1, 4, 32), torch.zeros(1, 1, 4, 4)
    attention = model.transformer.h[0].self_attention
    arguments = {"residual": states, "alibi": torch.zeros(HEADS, 1, 4), "attention_mask": mask}
    attention(states, **arguments)
    with use_saliency(model, Saliency.from_tokens(scores_for(inputs))), pytest.raises(PatchError, match="outside of any pass"):
        attention(states, **arguments)


def test_layers_of_another_patched_model_are_refused():
    model = make_masked("bloom")
    other = make_masked("bloom")
    other.transformer.h[0] = model.transformer.h[0]
    patch_model(model, steer())
    with pytest.raises(PatchError, match=r"transformer\.h\.0\.self_attention is steered already, by another patched model"):
        patch_model(other, steer())


def test_what_reads_attention_says_that_it_cannot():
    model = make_masked("bloom")
    reads = SaliencyConfig(source="decoder_attention")
    unseen = "BloomAttention calls no attention function that can be exchanged, so its queries and keys are not seen"
    with pytest.raises(PatchError, match=unseen), probe_attention(model, print):
        pass
    with pytest.raises(PatchError, match="reads attention weights.*Take another source"):
        patch_model(model, steer(saliency=reads))


def test_a_backend_gives_way_to_the_mask_and_says_so():
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="backend 'folded' gives way to 'mask', with the same result: BloomAttention"):
        patch_model(make_masked("bloom"), steer(backend="folded"))
