"""What is assumed of transformers holds on this version, and what does not hold is refused by name before anything is touched."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import transformers
from kit import tiny
from kit.asking import look, prompt, steer
from kit.broken import declared, reclass, renamed, state_of
from kit.tiny_encoders import ENCODING, make_encoder_model, modality_of
from kit.versions import CACHE
from transformers import DynamicCache
from transformers.models.qwen2 import modeling_qwen2

from hf_steer import AlignerConfig, SteerConfig, get_steer_status, patch_model, unpatch_model, use_saliency
from hf_steer.errors import GroundError
from hf_steer.ground import versions
from hf_steer.ground.survey import ASSUMPTIONS, needs, survey
from hf_steer.patching.plan import make_plan

LLAVA = ("llava", "llava_onevision")
GAZING = (*tiny.FAMILIES, "llava_onevision", "audioflamingo3", *tiny.UNCOMMON)
OLDEST, NEWEST = (f"{major}.{minor}" for major, minor in (versions.OLDEST, versions.NEWEST))
SUBJECTS = {"gaze": GAZING, "eyes": (*tiny.SEEING, *LLAVA), "aligners": (*ENCODING, "audioflamingo3")}
TRIED = [(row, family) for row in ASSUMPTIONS for family in SUBJECTS[row.needed_by]]


def model_of(family):
    if family in tiny.UNCOMMON:
        return tiny.make_model(family, "eager")
    return tiny.make_model(family) if family in tiny.FAMILIES else make_encoder_model(family)


def config_of(family, part):
    if part == "aligners":
        modality = "audio" if family == "audioflamingo3" else modality_of(family)
        return SteerConfig(aligners=(AlignerConfig(modality=modality),))
    return steer(family, source="vision_attention" if part == "eyes" else None)


@functools.cache
def plan_of(family, part):
    return make_plan(model_of(family), config_of(family, part))


@pytest.mark.parametrize(("row", "family"), TRIED, ids=[f"{row.name}-{family}" for row, family in TRIED])
def test_this_version_holds_what_is_assumed_of_it(row, family):
    plan = plan_of(family, row.needed_by)
    assert row.needed_by in needs(plan)
    fault = row.find(plan)
    assert fault is None, f"{row.name} ({row.says}): {fault}"


def test_every_family_of_the_table_is_surveyed():
    from hf_steer.families import FAMILIES

    surveyed = {family for families in SUBJECTS.values() for family in families}
    assert surveyed >= {name for name, row in FAMILIES.items() if row.composes or row.blocks} | set(ENCODING)


def test_decoders_and_layers_that_drop_keywords_are_steered_all_the_same(monkeypatch):
    for broken in (drops_keywords_in_the_decoder, drops_keywords_in_the_layers, takes_nothing_more):
        model = model_of("qwen2")
        plain = model(**prompt()).logits
        patch_model(model, config_of("qwen2", "gaze"))
        with use_saliency(model, look(prompt())):
            expected = model(**prompt()).logits
        unpatch_model(model)
        broken(model, monkeypatch)
        patch_model(model, config_of("qwen2", "gaze"))
        with use_saliency(model, look(prompt())):
            assert torch.equal(model(**prompt()).logits, expected)
        assert torch.equal(model(**prompt()).logits, plain)
        monkeypatch.undo()


def rename(part, old, new, **changes):
    def broken(model, monkeypatch):
        module = part(model)
        reclass(module, forward=declared(type(module), renamed(old, new, **changes)))

    return broken


def decoder(model):
    return model.get_decoder()


def root(model):
    return model


def tower(model):
    return model.get_encoder(modality="image")


def takes_nothing_more(model, monkeypatch):
    module = decoder(model)
    reclass(module, forward=declared(type(module), lambda own: None if own.kind is own.VAR_KEYWORD else own))


def loses_its_eager_function(model, monkeypatch):
    def function_of(implementation, kind):
        raise AttributeError(f"{kind.__module__} has no eager_attention_forward")

    monkeypatch.setattr("hf_steer.ground.survey.function_of", function_of)


def drops_keywords_in_the_decoder(model, monkeypatch):
    module = decoder(model)
    inner = type(module).forward

    @functools.wraps(inner)
    def forward(self, *args, hf_steer=None, **kwargs):
        return inner(self, *args, **kwargs)

    reclass(module, forward=forward)


def drops_keywords_in_the_layers(model, monkeypatch):
    reclass(decoder(model))
    inner = modeling_qwen2.Qwen2DecoderLayer.forward
    monkeypatch.setattr(
        modeling_qwen2.Qwen2DecoderLayer, "forward", lambda self, *args, hf_steer=None, **kwargs: inner(self, *args, **kwargs)
    )


def drops_the_cache(model, monkeypatch):
    module = decoder(model)
    inner = type(module).forward

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        return inner(self, *args, **{**kwargs, CACHE: None})

    reclass(module, forward=forward)


def calls_no_attention_function(model, monkeypatch):
    reclass(decoder(model))
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))


def moves_rows_otherwise(model, monkeypatch):
    monkeypatch.setattr("transformers.DynamicCache", type("DynamicCache", (DynamicCache,), {"fork_rows": lambda self, rows: None}))


def tells_no_sizes(model, monkeypatch):
    monkeypatch.delattr(transformers.Cache, "get_mask_sizes")


def batches_otherwise(model, monkeypatch):
    reclass(model, generate_batch_v2=lambda self, inputs: None)


def tells_flash_nothing_of_pictures(model, monkeypatch):
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._flash_attention_forward", lambda query, key, value: None)


BREAKS = [  # of a fact, the part of the table that needs it, a family that has it, how it breaks
    ("decoder_arguments", "gaze", "qwen2", rename(decoder, CACHE, "kv", annotation=inspect.Parameter.empty)),
    ("decoder_arguments", "gaze", "qwen2_vl", rename(decoder, "inputs_embeds", "embeddings")),
    ("root_arguments", "gaze", "qwen2", rename(root, "attention_mask", "real")),
    ("attention_functions", "gaze", "qwen2", loses_its_eager_function),
    ("cache_methods", "gaze", "qwen2", moves_rows_otherwise),
    ("cache_methods", "gaze", "qwen2", tells_no_sizes),
    ("steered_pass", "gaze", "qwen2", drops_the_cache),
    ("steered_pass", "gaze", "qwen2", calls_no_attention_function),
    ("continuous_batching", "gaze", "qwen2", batches_otherwise),
    ("tower_arguments", "eyes", "qwen2_vl", rename(tower, "grid_thw", "sizes_of_pictures")),
    ("picture_segments", "eyes", "qwen2_vl", tells_flash_nothing_of_pictures),
    ("sound_masks", "aligners", "qwen2_audio", rename(root, "feature_attention_mask", "frames_mask")),
    ("sound_masks", "aligners", "wav2vec2", rename(root, "attention_mask", "samples_mask")),
    ("perceived_arguments", "aligners", "wav2vec2", rename(root, "input_values", "sound")),
]


def faults_in(message):
    """Names of the facts that an error lists."""
    return {row.name for row in ASSUMPTIONS if f"{row.name} ({row.says}): " in message}


def refusal_of(model, config):
    with pytest.raises(GroundError) as caught:
        patch_model(model, config)
    return str(caught.value)


def test_every_fact_has_a_way_to_break_it():
    assert {name for name, *_ in BREAKS} == {row.name for row in ASSUMPTIONS}


@pytest.mark.parametrize(("name", "part", "family", "broken"), BREAKS)
def test_a_fact_that_does_not_hold_is_refused_by_name_and_nothing_is_touched(name, part, family, broken, monkeypatch):
    model = model_of(family)
    broken(model, monkeypatch)
    before = state_of(model)
    message = refusal_of(model, config_of(family, part))
    assert name in faults_in(message)
    assert faults_in(message) <= {name, "steered_pass"}, message  # the proof trips over what the others name
    assert f"cannot be steered with transformers {transformers.__version__}; tested are {OLDEST} to {NEWEST}. " in message
    assert type(model).__name__ in message
    assert message.endswith("Nothing was changed. Install a tested transformers, or update hf_steer.")
    assert state_of(model) == before
    assert not get_steer_status(model).patched


def test_all_that_fails_is_listed_at_once(monkeypatch):
    model = model_of("qwen2_vl")
    config = SteerConfig(attention=config_of("qwen2_vl", "eyes").attention, aligners=config_of("qwen2_vl", "aligners").aligners)
    ours = {"decoder_arguments", "root_arguments", "cache_methods", "steered_pass", "continuous_batching",
            "tower_arguments"}  # fmt: skip
    rename(decoder, "use_cache", "keep")(model, monkeypatch)
    drops_the_cache(model, monkeypatch)
    rename(root, "attention_mask", "real")(model, monkeypatch)
    rename(tower, "grid_thw", "sizes")(model, monkeypatch)
    batches_otherwise(model, monkeypatch)
    moves_rows_otherwise(model, monkeypatch)
    before = state_of(model)
    assert faults_in(refusal_of(model, config)) == ours
    assert state_of(model) == before


def test_what_a_plan_does_not_rely_on_is_not_held_against_it(monkeypatch):
    model = model_of("qwen2_vl")
    rename(tower, "grid_thw", "sizes")(model, monkeypatch)
    drops_the_cache(model, monkeypatch)
    survey(make_plan(model, config_of("qwen2_vl", "aligners")))
    assert faults_in(refusal_of(model, config_of("qwen2_vl", "gaze"))) == {"steered_pass"}


def test_a_fault_is_not_remembered_once_it_is_mended(monkeypatch):
    model = model_of("qwen2")
    plain = model(**prompt()).logits
    reclass(decoder(model))
    inner = modeling_qwen2.Qwen2Attention.forward
    lost = lambda self, *args, **kwargs: inner(self, *args, **{**kwargs, CACHE: None})  # noqa: E731
    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", lost)
    refusal_of(model, config_of("qwen2", "gaze"))
    monkeypatch.undo()
    patch_model(model, config_of("qwen2", "gaze"))
    with use_saliency(model, look(prompt())):
        assert not model(**prompt()).logits.allclose(plain, atol=1e-3)
