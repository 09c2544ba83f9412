"""On a transformers that is newer than any tested one: said once, and what works is decided by looking."""

from __future__ import annotations

import warnings

import pytest
from kit.asking import generate, look, plain_generate, prompt, steer, steered
from kit.broken import reclass, state_of
from kit.tiny import make_model

from hf_steer import patch_model, unpatch_model
from hf_steer.errors import GroundError
from hf_steer.ground.versions import NEWEST, OLDEST, warn_untested

NEVER_SEEN = "5.99.0"
RANGE = rf"transformers 5\.99\.0; tested are {OLDEST[0]}\.{OLDEST[1]} to {NEWEST[0]}\.{NEWEST[1]}"
SAID = rf"has not been tested on this {RANGE}\..*either works or raises.*Update hf_steer"


@pytest.fixture
def release(monkeypatch):
    """Says that another transformers is installed."""

    def set_to(version):
        monkeypatch.setattr("hf_steer.ground.versions.transformers.__version__", version)
        warn_untested.cache_clear()

    yield set_to
    warn_untested.cache_clear()


def test_a_newer_release_is_warned_of_once_at_the_callers_line_and_steered_all_the_same(release):
    inputs = prompt()
    said = look(inputs)
    expected = generate(steered(), inputs, said)
    release(NEVER_SEEN)
    with pytest.warns(UserWarning, match=SAID) as caught:
        model = patch_model(make_model("qwen2"), steer())
    assert [warning.filename for warning in caught] == [__file__]
    assert generate(model, inputs, said).equal(expected)
    assert not plain_generate(model, inputs).equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(unpatch_model(model), steer())
        patch_model(make_model("qwen2_vl"), steer("qwen2_vl"))


@pytest.mark.parametrize("version", ["5.14.0", "5.20.0rc1", "5.24.0", f"{NEWEST[0]}.{NEWEST[1]}.7.dev0"])
def test_a_release_up_to_the_newest_tested_one_is_not_warned_of(release, version):
    release(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(make_model("qwen2"), steer())


@pytest.mark.parametrize("version", [f"{NEWEST[0]}.{NEWEST[1] + 1}.0.dev0", "5.100.0", "6.0.0"])
def test_a_release_beyond_the_newest_tested_one_is_warned_of(release, version):
    release(version)
    with pytest.warns(UserWarning, match=f"has not been tested on this transformers {version}"):
        patch_model(make_model("qwen2"), steer())


@pytest.mark.filterwarnings("ignore:hf_steer has not been tested:UserWarning")
def test_a_newer_release_that_lacks_something_is_refused_as_a_tested_one_is(release):
    release(NEVER_SEEN)
    model = make_model("qwen2")
    reclass(model, generate_batch_v2=lambda self, inputs: None)
    before = state_of(model)
    with pytest.raises(GroundError, match=rf"{RANGE}\..*continuous_batching.*generate_batch_v2"):
        patch_model(model, steer())
    assert state_of(model) == before
