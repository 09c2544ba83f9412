"""What a saved configuration notes of other people's names, and what it says where their package is missing."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
from kit.plugins import BROKEN, GATE, lay_out, tables_as_they_were

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, Gate, GateConfig, SaliencyConfig, SteerConfig
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


def saved_with(name, package, *, noun="gate"):
    written = SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source=None), gate=GateConfig())).to_dict()
    written["attention"]["gate"] = {"kind": name}
    return {**written, "plugins": {noun: {name: package}}}


def test_a_name_of_a_script_is_noted_as_such():
    hf_steer.register_gate("of_a_script", Gate(reads=lambda reading, gate: (reading.age < 3).float(), options={}))
    config = SteerConfig(attention=AttentionConfig(gate=GateConfig("of_a_script")))
    written = json.loads(config.to_json())
    assert written["plugins"] == {"gate": {"of_a_script": None}}
    assert SteerConfig.from_dict(written) == config
    GATES.remove("of_a_script")
    with pytest.raises(ConfigError, match=r"gate 'of_a_script' .*script or notebook.*register_gate\('of_a_script', row"):
        SteerConfig.from_dict(written)


def test_a_configuration_of_our_names_has_no_word_of_plugins():
    gaze = AttentionConfig(gate=GateConfig(), saliency=SaliencyConfig(source="gradient"), backend="mask")
    config = SteerConfig(attention=gaze, aligners=AlignerConfig("audio"), base_model_type="qwen2_audio")
    assert "plugins" not in config.to_dict()
    assert "options" not in config.to_json()
    assert "plugins" not in SteerConfig(base_model_type="of_no_family").to_dict()


def test_a_package_that_no_longer_has_the_name_is_told_with_its_version(plugin):
    plugin("plugin-renamed", GATE.format(name="new_name"), version="2.3")
    with pytest.raises(ConfigError, match="'plugin-renamed', of which 2.3 is installed.*has none.*pip install -U plugin-renamed"):
        SteerConfig.from_dict(saved_with("old_name", "plugin-renamed"))


def test_a_package_that_is_broken_is_told_with_its_fault(plugin):
    plugin("plugin-damaged", BROKEN.format(first="pass"))
    with pytest.raises(ConfigError, match="gate 'damaged' is not known.*plugin-damaged.*ModuleNotFoundError") as caught:
        SteerConfig.from_dict(saved_with("damaged", "plugin-damaged"))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_same_name_of_another_package_is_another_thing(plugin):
    plugin("plugin-other", GATE.format(name="same_name"))
    with pytest.raises(ConfigError, match="gate 'same_name' came from the package 'plugin-one' when.* from 'plugin-other'"):
        SteerConfig.from_dict(saved_with("same_name", "plugin-one"))
    assert SteerConfig.from_dict(saved_with("same_name", "Plugin_Other")).attention.gate.kind == "same_name"
    assert SteerConfig.from_dict(saved_with("entropy", "plugin-one")).attention.gate.kind == "entropy"  # ours by now


@pytest.mark.parametrize(
    "noted",
    [
        [], {"gates": {}}, {"gate": ["doubt"]}, {"gate": {"doubt": 3}}, {"gate": {"doubt": "a; rm -rf b"}}, {"gate": {"{x}": None}},
        {"gate": {"doubt": "--index-url=http"}},
    ],
)  # fmt: skip
def test_a_note_that_is_none_of_ours_is_refused(noted):
    with pytest.raises(ConfigError, match="'plugins' maps family, backend, source, gate, router to names and the packages"):
        SteerConfig.from_dict({"schema_version": 1, "plugins": noted})


def test_what_a_file_names_is_not_imported(plugin, tmp_path):
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')\n")
    for name in ("never_imported", "never_imported.register"):
        with pytest.raises(ConfigError, match="is not known here"):
            SteerConfig.from_dict(saved_with(name, "never_imported"))
    assert "never_imported" not in sys.modules
