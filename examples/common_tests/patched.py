"""A plugin of pytest: writes what became of each test, and, where it is asked to, patches every model that the tests make.

A model is patched when its outermost constructor is done (`Model(config)`, `_from_config`, `from_pretrained`), so as users do it:
with a gaze that changes nothing where the model has one, a fresh aligner where it has an encoder, and its base left trainable.
"""

import contextlib
import functools
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, SaliencyConfig, SteerConfig

RECORD, PATCHES = "COMMON_TESTS_RECORD", "COMMON_TESTS_PATCHED"
"""Variables of the environment: the file for the record, and which of `GAZES` the models get; empty for none."""
GAZES = ("zero", "silent")
"""At λ = 0, with a source; or at λ = 2, and nobody says where to look."""
SOURCES = {
    "llama": "text_similarity",
    "qwen3_next": "text_similarity",
    "qwen2_vl": "vision_attention",
}
"""`config.model_type` -> the source that reads for a gaze of strength 0."""
ALIGNED = {"qwen2_vl": "image", "whisper": "audio"}
"""`config.model_type` -> the encoder behind which the fresh aligner goes."""

making = 0
rows, models = {}, Counter()
current = None


def config_for(model_type):
    """What all models of a type are patched with."""
    strength, source = (0.0, SOURCES.get(model_type)) if os.environ[PATCHES] == "zero" else (2.0, None)
    gaze = AttentionConfig(strength=strength, saliency=SaliencyConfig(source=source)) if model_type in SOURCES else None
    # the balance joins the loss, and refuses training steps without labels, of which these tests have some
    aligner = AlignerConfig(ALIGNED[model_type], num_experts=2, load_balancing_weight=0.0) if model_type in ALIGNED else None
    return SteerConfig(attention=gaze, aligners=() if aligner is None else (aligner,))


def take(model):
    """Patch a model that a test has made. The test's random numbers are those that it draws without a patch."""
    if not isinstance(model, PreTrainedModel) or hasattr(model, "hf_steer"):
        return
    if model.config.model_type not in {*SOURCES, *ALIGNED}:
        return
    state = torch.get_rng_state()
    try:
        hf_steer.patch_model(model, config_for(model.config.model_type), freeze_base=False)
        models["patched"] += 1
    except hf_steer.SteerError as error:
        models[f"{type(model).__name__} refused: {str(error).splitlines()[0]}"] += 1
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def outermost():
    """Whether nothing that makes a model is already at work."""
    global making
    making += 1
    try:
        yield making == 1
    finally:
        making -= 1


def wrap_constructors():
    """`PreTrainedModel` and its classes give patched models."""
    load, build = PreTrainedModel.from_pretrained.__func__, PreTrainedModel._from_config.__func__

    def makes(function):
        @functools.wraps(function)
        def make(cls, *args, **kwargs):
            with outermost() as alone:
                made = function(cls, *args, **kwargs)
                if alone:
                    take(made[0] if isinstance(made, tuple) else made)
            return made

        return classmethod(make)

    PreTrainedModel.from_pretrained, PreTrainedModel._from_config = makes(load), makes(build)


def wrap_setter():
    """Another attention implementation is set as hf_steer asks for it: steering off, set, steering on."""
    setter = PreTrainedModel.set_attn_implementation

    @functools.wraps(setter)
    def change(self, *args, **kwargs):
        patched = hasattr(self, "hf_steer")
        if patched:
            hf_steer.unpatch_model(self)
        try:
            return setter(self, *args, **kwargs)
        finally:
            if patched:
                take(self)

    PreTrainedModel.set_attn_implementation = change


def wrap_init(model_class):
    """`Model(config)` gives a patched model."""
    init = model_class.__init__

    @functools.wraps(init)
    def begin(self, *args, **kwargs):
        with outermost() as alone:
            init(self, *args, **kwargs)
            if alone and type(self) is model_class:
                take(self)

    model_class.__init__ = begin


def pytest_collection_finish(session):
    if not os.environ.get(PATCHES):
        return
    wrap_constructors()
    wrap_setter()
    for model_class in {model_class for item in session.items for model_class in item.cls.all_model_classes}:
        wrap_init(model_class)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    models.clear()
    result = yield
    rows[f"{item.cls.__name__}::{item.name}"]["models"] = dict(models)
    return result


def pytest_runtest_logreport(report):
    row = rows.setdefault(report.nodeid.split("::", 1)[1], {"outcome": "passed", "reasons": []})
    if report.outcome == "passed":
        return
    if report.outcome == "skipped":
        row["outcome"] = "skipped" if row["outcome"] == "passed" else row["outcome"]
        row["reasons"].append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))
        return
    row["outcome"] = "failed" if report.when == "call" else "error"
    crash = getattr(report.longrepr, "reprcrash", None)
    subtest = getattr(getattr(report, "context", None), "msg", None)
    said = (crash.message if crash else str(report.longrepr)).splitlines()[0]
    row["reasons"].append(f"[{subtest}] {said}" if subtest else said)


def pytest_sessionfinish(session):
    if RECORD in os.environ:
        Path(os.environ[RECORD]).write_text(json.dumps(rows))
