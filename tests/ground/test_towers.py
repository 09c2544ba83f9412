"""Eyes and ears are found by structure: in every architecture of the installed transformers, and at the right place."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from kit import tiny
from kit.architectures import classes, modalities, without_weights
from kit.tiny_encoders import ENCODING, make_encoder_model, modality_of
from torch import nn

from hf_steer import AlignerConfig, ConfigError, SteerConfig, patch_model
from hf_steer.ground.towers import find_encoders

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CODES = "turns (pictures|sounds) into tokens of its vocabulary, and no gradient comes back"
ALONE = "alone, which has no layers"
STAGES = "it has no list of equal layers whose features are the last dimension"
UNTOLD = "the size of what it hands on is not to be told from its weights"

EXCEPTIONS = {
    ("apertus1p5", "image"): {"layers": CODES, "output": CODES},
    ("apertus1p5", "audio"): {"layers": CODES, "output": CODES},
    ("chameleon", "image"): {"layers": CODES, "output": CODES},
    ("emu3", "image"): {"layers": CODES, "output": CODES},
    ("fuyu", "image"): {"layers": ALONE, "output": ALONE},
    ("gemma4_unified", "image"): {"layers": ALONE, "output": ALONE},
    ("gemma4_unified", "audio"): {"layers": ALONE, "output": ALONE},
    ("inkling_mm_model", "image"): {"layers": ALONE, "output": ALONE},
    ("inkling_mm_model", "audio"): {"layers": ALONE, "output": ALONE},
    ("muse_spark", "audio"): {"layers": ALONE, "output": ALONE},
    ("florence2", "image"): {"layers": STAGES, "output": UNTOLD},
    ("fast_vlm", "image"): {"layers": STAGES},
    ("gemma3n", "image"): {"layers": STAGES},
    ("vibevoice", "audio"): {"layers": STAGES},
    ("vibevoice_asr", "audio"): {"layers": STAGES},
    ("granite4_vision", "image"): {"output": r"several modules \(layerwise_projectors\) read several of its states"},
    ("granite_speech5_ctc", "audio"): {"output": UNTOLD},
    ("pp_formulanet", "image"): {"output": UNTOLD},
    ("sew", "audio"): {"output": UNTOLD},
}
"""Where an aligner cannot go, and why; all others take one at the encoder's output and in its layers."""
ABSENT = {("udop", "image"): "one encoder reads pictures and words together"}
"""Where there is no encoder that could take one anywhere, and why."""
NOT_BUILT = ("deepseek_ocr2", "hunyuan_vl", "nemotron_h_omni", "perception_lm", "qwen4_exp")
"""Their default configuration makes no model."""
CASES = [(kind, modality) for kind, own in classes().items() for modality in modalities(own)]


@pytest.fixture(scope="module")
def found():
    """Model type -> its encoders: each model is made once."""
    kept: dict[str, tuple] = {}

    def find(kind):
        if kind not in kept:
            kept.clear()
            try:
                model = without_weights(kind)
            except Exception as error:  # which configurations make a model, each release decides anew
                if isinstance(error, ImportError) or VERSION < (5, 23):
                    pytest.skip(str(error).strip().splitlines()[0])
                raise
            kept[kind] = (model, find_encoders(model))
        return kept[kind]

    return find


@pytest.mark.parametrize(("kind", "modality"), [case for case in CASES if case[0] not in NOT_BUILT])
def test_every_architecture_takes_an_aligner_or_says_why_not(found, kind, modality):
    model, result = found(kind)
    if (kind, modality) in ABSENT:
        assert ABSENT[kind, modality] in result.reasons[modality]
        return
    encoder, expected = result.encoders[modality], EXCEPTIONS.get((kind, modality), {})
    lacks = {placement: why for placement, why in encoder.lacks.items() if placement != "projector"}
    assert sorted(lacks) == sorted(expected), lacks
    for placement, why in expected.items():
        assert re.search(why, lacks[placement])
    assert isinstance(encoder.tower, nn.Module)
    assert encoder.tower is not model
    assert ("projector" in encoder.lacks) == (encoder.placeholder_ids == ())
    if "layers" not in lacks:
        assert encoder.layer_size > 1
        assert {site.module for site in encoder.layers} <= set(encoder.tower.modules())
    if "output" not in lacks:
        assert encoder.size > 1


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_most_architectures_take_one_everywhere(modality):
    perceiving = [case for case in CASES if case[1] == modality]
    whole = [case for case in perceiving if case not in (*EXCEPTIONS, *ABSENT) and case[0] not in NOT_BUILT]
    assert len(whole) >= 0.8 * len(perceiving)


MERGER, PROJECTOR = "model.visual.merger", "model.multi_modal_projector"
PLACES = {
    "whisper": ("model.encoder", "model.encoder", None, "attention_mask", 3),
    "wav2vec2": ("wav2vec2.encoder", "wav2vec2.encoder", None, "attention_mask", 3),
    "hubert": ("hubert.encoder", "hubert.encoder", None, "attention_mask", 3),
    "qwen2_audio": ("model.audio_tower", PROJECTOR, PROJECTOR, "feature_attention_mask", 3),
    "voxtral": ("model.audio_tower", "model.audio_tower", PROJECTOR, None, 3),
    "llava": ("model.vision_tower", PROJECTOR, PROJECTOR, None, 2),
    "llava_onevision": ("model.vision_tower", PROJECTOR, PROJECTOR, None, 3),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), ("model.visual", MERGER, MERGER, None, 2)),
}
"""Tower, outlet, projector, the argument that tells real frames, and layers that matter: LLaVA reads an inner state."""


@pytest.mark.parametrize("family", ENCODING)
def test_the_parts_of_well_known_families_are_found(family):
    model = make_encoder_model(family)
    names = {module: name for name, module in model.named_modules()}
    own = find_encoders(model).encoders[modality_of(family)]
    projector = None if own.projector is None else names[own.projector]
    assert (names[own.tower], names[own.outlet], projector, own.mask, len(own.layers)) == PLACES[family]
    assert own.reads == (PLACES[family][0] != PLACES[family][1])


def test_text_alone_has_neither_and_says_so():
    model = tiny.make_model("qwen2")
    assert find_encoders(model).reasons == {
        "image": "Qwen2ForCausalLM takes no pictures",
        "audio": "Qwen2ForCausalLM takes no sounds",
    }
    with pytest.raises(ConfigError, match=r"'qwen2' has encoders for none: Qwen2ForCausalLM takes no sounds.*hf_steer.compose"):
        patch_model(model, SteerConfig(aligners=(AlignerConfig(modality="audio"),)))


def test_a_placement_that_is_not_there_is_refused_with_its_reason():
    if "fuyu" not in classes():
        pytest.skip("this release has no Fuyu in its mappings")
    model = without_weights("fuyu")
    with pytest.raises(ConfigError, match=f"'output' does not go with .*'fuyu': .*{ALONE}.*can be placed at 'projector' there"):
        patch_model(model, SteerConfig(aligners=(AlignerConfig(modality="image"),)))


def test_nothing_is_allocated_or_changed():
    model = without_weights("internvl")
    before = {name: id(module) for name, module in model.named_modules()}
    find_encoders(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.device("meta") == model.device
