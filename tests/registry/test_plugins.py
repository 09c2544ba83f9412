"""Installed plugins: asked when a name is unknown and never before, noted in what is saved, and told where they are missing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from kit.plugins import BROKEN, EXAMPLE, GATE, ROOT, install, lay_out, tables_as_they_were
from kit.tiny import make_model

import hf_steer
from hf_steer import GateConfig, SteerConfig
from hf_steer.errors import ConfigError
from hf_steer.registry import GATES


@pytest.fixture(autouse=True)
def _own_tables():
    with tables_as_they_were():
        yield


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Lay plugins out in a folder of `sys.path`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return partial(lay_out, tmp_path)


def run_python(code, path):
    environment = {"PYTHONPATH": f"{path}:{ROOT}:{ROOT / 'tests'}", "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example, installed by pip."""
    target = tmp_path_factory.mktemp("site")
    install(EXAMPLE, target)
    return target


USED = """
import sys
import torch
from kit.tiny import make_model, make_prompt
from kit.tiny_encoders import make_encoder_model, make_encoder_inputs
import hf_steer
from hf_steer import *

loaded = lambda: "hf_steer_example" in sys.modules
assert not loaded(), "at import"
known = AttentionConfig(gate=GateConfig("margin"), saliency=SaliencyConfig(source="gradient"), backend="mask")
model = patch_model(make_model("qwen2_vl"), SteerConfig(attention=known, aligners=AlignerConfig("image")))
assert not loaded(), "for names that are known"

gaze = AttentionConfig(
    strength=3.0, backend="written_out", saliency=SaliencyConfig(source="novelty", options={"power": 2.0}),
    gate=GateConfig("doubt", initial=1.0),
)
assert loaded()
config = SteerConfig(attention=gaze, aligners=AlignerConfig("image", kind="low_rank", options={"rank": 4}))
model, inputs = make_encoder_model("qwen2_vl"), make_encoder_inputs("qwen2_vl")
plain = model(**inputs).logits
patch_model(model, config)
assert not model(**inputs).logits.equal(plain)
with torch.no_grad():
    model.hf_steer.aligners[0].up.weight.normal_()
steered = model(**inputs).logits
save_steering(model, sys.argv[1])
unpatch_model(model)
assert model(**inputs).logits.equal(plain)
assert SteerConfig.from_pretrained(sys.argv[1]).attention == gaze
patch_model(model, SteerConfig.from_pretrained(sys.argv[1]))
load_steering(model, sys.argv[1])
assert model(**inputs).logits.equal(steered)

model = patch_model(make_model("smollm3"), SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source=None))))
model.hf_steer.plan.config.save_pretrained(sys.argv[2])
"""


def test_the_example_is_installed_used_saved_and_missed_elsewhere(installed, tmp_path):
    run_python(f"import sys; sys.argv = ['', {str(tmp_path / 'all')!r}, {str(tmp_path / 'family')!r}]\n{USED}", installed)
    noted = json.loads((tmp_path / "all" / "steer_config.json").read_text())["plugins"]
    package = "hf-steer-example"
    assert noted == {
        "router": {"low_rank": package}, "backend": {"written_out": package}, "source": {"novelty": package},
        "gate": {"doubt": package},
    }  # fmt: skip
    assert json.loads((tmp_path / "family" / "steer_config.json").read_text())["plugins"] == {"family": {"smollm3": package}}
    for saved, what in (("all", "router 'low_rank'"), ("family", "family 'smollm3'")):
        message = f"{what} is not known here. It comes with the package '{package}', which is not installed.*pip install {package}"
        with pytest.raises(ConfigError, match=f"steer_config.json: {message}"):
            SteerConfig.from_pretrained(tmp_path / saved)
        with pytest.raises(ConfigError, match=message):
            hf_steer.from_pretrained(tmp_path / saved)


def test_a_plugin_is_asked_at_the_first_unknown_name_and_once(plugin, tmp_path):
    (tmp_path / "hf_steer_asked_log.py").write_text("calls = []\n")
    calls = "    import hf_steer_asked_log\n    hf_steer_asked_log.calls.append(1)\n"
    plugin("plugin-asked-once", GATE.format(name="asked_once") + calls)
    GateConfig("entropy")
    assert "hf_steer_asked_log" not in sys.modules
    with pytest.raises(ConfigError, match="'asked_once'; got 'unknown'"):
        GateConfig("unknown")
    assert GateConfig("asked_once").row is GATES["asked_once"]
    assert "unknown" not in GATES
    assert sys.modules["hf_steer_asked_log"].calls == [1]
    assert GATES.provider_of("asked_once") == "plugin-asked-once"


def test_a_package_that_is_installed_meanwhile_is_found(plugin):
    with pytest.raises(ConfigError, match="got 'came_later'"):
        GateConfig("came_later")
    plugin("plugin-came-later", GATE.format(name="came_later"))
    assert GateConfig("came_later").threshold == 0.5


def test_an_entry_point_may_name_a_module(plugin):
    plugin("plugin-by-import", GATE.format(name="by_import") + "\nregister()\n", value="plugin_by_import")
    assert GATES.provider_of("by_import") == "plugin-by-import"


def test_a_module_of_a_package_that_registers_by_hand_is_known_as_the_packages(plugin):
    plugin("plugin-by-hand", GATE.format(name="by_hand"))
    import plugin_by_hand

    plugin_by_hand.register()
    assert GATES.provider_of("by_hand") == "plugin-by-hand"


def test_a_plugin_that_fails_is_named_chained_and_leaves_nothing(plugin):
    first = "hf_steer.register_gate('half_way', hf_steer.Gate(reads=lambda reading, gate: reading.age, options={}))"
    plugin("plugin-broken", BROKEN.format(first=first))
    message = "the plugin 'plugin-broken' of the package 'plugin-broken' could not be loaded .ModuleNotFoundError: No module"
    with pytest.raises(ConfigError, match=message) as caught:
        GateConfig("half_way")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "half_way" not in set(GATES)
    with pytest.warns(UserWarning, match=f"{message}.*if it has a family 'smollm3', that is left out"):
        hf_steer.patch_model(make_model("smollm3"), SteerConfig())


def test_a_plugin_that_fails_does_not_stand_in_the_way_of_others(plugin):
    plugin("plugin-a-broken", BROKEN.format(first="pass"))
    plugin("plugin-b-whole", GATE.format(name="whole"))
    with pytest.warns(UserWarning, match="the plugin 'plugin-a-broken' .* could not be loaded .*; it is left out"):
        assert GateConfig("whole").release == 0.4


def test_a_plugin_that_is_interrupted_is_asked_again(plugin, tmp_path):
    (tmp_path / "hf_steer_patience.py").write_text("calls = []\n")
    calls = "    from hf_steer_patience import calls\n    calls.append(1)\n    if len(calls) < 2: raise KeyboardInterrupt\n"
    plugin("plugin-tedious", GATE.format(name="tedious") + calls)
    with pytest.raises(KeyboardInterrupt):
        GateConfig("tedious")
    assert "tedious" not in set(GATES)
    assert GATES.provider_of("tedious") == "plugin-tedious"


def test_two_plugins_cannot_have_one_name(plugin):
    plugin("plugin-first", GATE.format(name="wanted_by_two"))
    again = "    hf_steer.register_gate('wanted_by_two', hf_steer.Gate(reads=len, options={}))\n"
    plugin("plugin-second", GATE.format(name="of_the_second") + again)
    taken = "'plugin-second' .* there is a gate 'wanted_by_two' already, from the package 'plugin-first'"
    with pytest.warns(UserWarning, match=taken):
        assert GATES.provider_of("wanted_by_two") == "plugin-first"
    with pytest.raises(ConfigError, match="plugin-second.*could not be loaded"):
        GateConfig("of_the_second")


def test_threads_that_ask_at_once_wait_for_one_loading(plugin):
    plugin("plugin-slow", "import time\n" + GATE.format(name="slow").replace("    gate =", "    time.sleep(0.3)\n    gate ="))
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait()
        return GateConfig("slow").row

    with ThreadPoolExecutor(8) as pool:
        assert {id(row) for row in pool.map(ask, range(8))} == {id(GATES["slow"])}
