"""A router that somebody else has added: steered by in every place, and heard of nowhere where it does not route."""

from __future__ import annotations

import pytest
import torch
from kit.plugins import tables_as_they_were
from kit.tiny_encoders import make_encoder_inputs, make_encoder_model

import hf_steer
from hf_steer import AlignerConfig, ConfigError, Router, SteerConfig
from hf_steer.training import record_routing


@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield



class Shift(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(features))

    def forward(self, features):
        return features + self.by


class Towards(Shift):
    def forward(self, features, text, *, mask, text_mask):
        words = (text * text_mask[..., None]).sum(1, keepdim=True)
        return torch.where(mask[..., None], features + self.by * words, features)


class Levels(Shift):
    def forward(self, features, layer):
        return features + layer * self.by


class Mean(Shift):
    """Towards the mean of all tokens; fresh, it changes nothing."""

    def __init__(self, features):
        super().__init__(features)
        torch.nn.init.zeros_(self.by)

    def forward(self, features):
        return features + self.by * features.mean(-2, keepdim=True)


class Convolution(torch.nn.Module):
    """Each token and the one before it."""

    def __init__(self, features):
        super().__init__()
        self.over = torch.nn.Conv1d(features, features, 2, padding=1, bias=False)
        torch.nn.init.zeros_(self.over.weight)

    def forward(self, features):
        return features + self.over(features.transpose(1, 2))[..., :-1].transpose(1, 2)


class Widely(Mean):
    def forward(self, features, layer):
        return features + layer * self.by * features.amax(-2, keepdim=True)


def shown(model, inputs, **aligner):
    hf_steer.patch_model(model, SteerConfig(aligners=AlignerConfig("image", **aligner)))
    with record_routing(model) as heard:
        logits = model(**inputs).logits
    assert not heard.read()
    hf_steer.unpatch_model(model)
    return logits


@pytest.mark.parametrize("placement", ["output", "layers", "projector"])
def test_a_router_that_does_not_route_steers_and_is_heard_of_nowhere(placement):
    hf_steer.register_router("shift", Router(build=lambda config, size, layers: Shift(size), routes=False))
    model, inputs = make_encoder_model("llava"), make_encoder_inputs("llava")
    plain = model(**inputs).logits
    assert not shown(model, inputs, placement=placement, kind="shift").equal(plain)
    assert model(**inputs).logits.equal(plain)


def test_a_router_that_reads_text_gets_the_prompts_text():
    row = Router(build=lambda config, size, layers: Towards(size), placements=("projector",), reads_text=True, routes=False)
    hf_steer.register_router("towards", row)
    model, inputs = make_encoder_model("llava"), make_encoder_inputs("llava")
    plain = model(**inputs).logits
    assert not shown(model, inputs, placement="projector", kind="towards").equal(plain)
    with pytest.raises(ConfigError, match="reads the prompt's text.*use placement='projector'; got 'output'"):
        AlignerConfig("image", kind="towards")


def test_a_router_with_layers_of_its_own_is_built_once_and_told_the_layer():
    row = Router(build=lambda config, size, layers: Levels(size), placements=("layers",), own_layers=True, routes=False)
    hf_steer.register_router("levels", row)
    model, inputs = make_encoder_model("llava"), make_encoder_inputs("llava")
    plain = model(**inputs).logits
    assert shown(model, inputs, placement="layers", layers=(0,), kind="levels").equal(plain)  # 0 times the shift
    assert not shown(model, inputs, placement="layers", kind="levels").equal(plain)
    with pytest.raises(ConfigError, match="an aligner of kind 'levels' goes into layers; got placement='output'"):
        AlignerConfig("image", kind="levels")


def test_a_router_that_cannot_be_built_at_a_size_is_refused_before_anything_is_touched():
    refuse = lambda config, size: f"aligner 'odd' needs odd sizes; got {size}." if size % 2 == 0 else None  # noqa: E731
    hf_steer.register_router("odd", Router(build=lambda config, size, layers: Shift(size), routes=False, refuse=refuse))
    model = make_encoder_model("llava")
    with pytest.raises(ConfigError, match="aligner 'odd' needs odd sizes; got 16"):
        hf_steer.patch_model(model, SteerConfig(aligners=AlignerConfig("image", kind="odd")))
    assert not hf_steer.get_steer_status(model).patched


@pytest.mark.parametrize("placement", ["output", "layers", "projector"])
@pytest.mark.parametrize("kind", [Mean, Convolution])
def test_a_router_that_makes_one_token_out_of_several_is_refused_where_it_is_handed_no_mask(kind, placement):
    """Fresh, it is the identity and shows nothing; trained, it would let padding in."""
    hf_steer.register_router("mixing", Router(build=lambda config, size, layers: kind(size), routes=False))
    model, state = make_encoder_model("llava"), torch.random.get_rng_state()
    refused = rf"kind 'mixing' at placement='{placement}' would let padding.*Allowed are kinds that steer each token by itself"
    with pytest.raises(ConfigError, match=refused):
        hf_steer.patch_model(model, SteerConfig(aligners=AlignerConfig("image", kind="mixing", placement=placement)))
    assert not hf_steer.get_steer_status(model).patched
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mixing_router_with_layers_of_its_own_is_refused_too():
    row = Router(build=lambda config, size, layers: Widely(size), placements=("layers",), own_layers=True, routes=False)
    hf_steer.register_router("widely", row)
    with pytest.raises(ConfigError, match="would let padding"):
        hf_steer.patch_model(
            make_encoder_model("llava"), SteerConfig(aligners=AlignerConfig("image", kind="widely", placement="layers"))
        )


def test_a_router_that_cannot_be_tried_is_said_and_left_to_fail_in_its_own_words():
    def forward(self, features):
        if len(features) == 1 and features.shape[1] == 5:
            raise RuntimeError("not on this machine")
        return features + self.by

    hf_steer.register_router(
        "moody", Router(build=lambda config, size, layers: type("Moody", (Shift,), {"forward": forward})(size), routes=False)
    )
    model, inputs = make_encoder_model("llava"), make_encoder_inputs("llava")
    with pytest.warns(UserWarning, match=r"kind 'moody' cannot be tried.*\(RuntimeError: not on this machine\).*is not known"):
        assert not shown(model, inputs, kind="moody").equal(model(**inputs).logits)


@pytest.mark.parametrize("where", ["build", "forward"])
def test_a_mistake_in_a_router_comes_through_in_its_own_words(where):
    def mistaken(*args):
        raise KeyError("a slip")

    build = mistaken if where == "build" else lambda config, size, layers: type("Slip", (Shift,), {"forward": mistaken})(size)
    hf_steer.register_router("slip", Router(build=build, routes=False))
    model = make_encoder_model("llava")
    with pytest.raises(KeyError, match="a slip"):
        hf_steer.patch_model(model, SteerConfig(aligners=AlignerConfig("image", kind="slip")))
    assert not hf_steer.get_steer_status(model).patched
