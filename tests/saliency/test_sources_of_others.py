"""Sources, and layouts of families, that somebody else has added: read in their place like ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.plugins import tables_as_they_were
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import ConfigError, SaliencyConfig, SaliencyError, Source, read_saliency
from hf_steer.registry import FAMILIES, SOURCES
from hf_steer.saliency.layouts import LAYOUTS


@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield


def map_of(source, model=None, **options):
    model = make_encoder_model("qwen2_vl") if model is None else model
    found = read_saliency(model, make_encoder_inputs("qwen2_vl"), saliency=SaliencyConfig(source=source, **options))
    return found.maps()["image", 0, 0]


def test_eyes_read_the_blocks_of_their_row_and_get_their_options():
    ours = SOURCES["vision_attention"].eyes
    row = Source(eyes=lambda blocks, times: times * ours(blocks), options={"times": 1.0}, blocks="all")
    hf_steer.register_source("wide_eyes", row)
    assert map_of("wide_eyes").equal(map_of("vision_attention", blocks="all"))
    assert not map_of("wide_eyes").equal(map_of("vision_attention"))
    torch.testing.assert_close(map_of("wide_eyes", options={"times": 3.0}), 3 * map_of("vision_attention", blocks="all"))
    assert map_of("wide_eyes", blocks=(-1,)).equal(map_of("vision_attention"))


def test_a_source_that_reads_heads_may_have_them_chosen():
    row = Source(prompt=lambda sight: -sight.attend(), options={"source_heads": None}, reads_heads=True)
    hf_steer.register_source("away", row)
    assert map_of("away").equal(-map_of("decoder_attention"))
    chosen = {0: (1,), 2: (0, 3)}
    assert map_of("away", source_heads=chosen).equal(-map_of("decoder_attention", source_heads=chosen))
    with pytest.raises(ConfigError, match="saliency source 'away' has no last_tokens; it has source_heads"):
        SaliencyConfig(source="away", last_tokens=2)


def test_a_family_may_bring_a_layout_along(monkeypatch):
    asked = []

    def layout(given, records, anatomy, whole):
        asked.append(anatomy.family)
        return LAYOUTS["qwen"](given, records, anatomy, whole)

    model = make_encoder_model("qwen2_vl")
    monkeypatch.setattr(type(model.config), "model_type", "qwen2_vl_of_mine")
    hf_steer.register_family("qwen2_vl_of_mine", dataclasses.replace(FAMILIES["qwen2_vl"], layout=layout))
    assert map_of("feature_norm", model).std() > 0
    assert set(asked) == {"qwen2_vl_of_mine"}


def test_a_layout_that_is_not_there_is_told(monkeypatch):
    model = make_encoder_model("qwen2_vl")
    monkeypatch.setattr(type(model.config), "model_type", "qwen2_vl_of_mine")
    hf_steer.register_family("qwen2_vl_of_mine", dataclasses.replace(FAMILIES["qwen2_vl"], layout="qwenn"))
    with pytest.raises(SaliencyError, match="family 'qwen2_vl_of_mine' has layout 'qwenn'; there are qwen, .*llava"):
        map_of("feature_norm", model)
