"""Saving and loading whole models with their steering."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
import transformers
from kit.gazing import gaze, logits, prompt_for, steer
from kit.hub import make_hub_cache
from kit.tiny import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import hf_steer
from hf_steer import ConfigError, FileError, PatchError, SteerConfig, patch_model


@pytest.fixture
def loud(monkeypatch):
    """transformers' warnings as a list; it logs them and does not raise."""
    heard = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr("transformers.modeling_utils.logger." + name, lambda message, *_: heard.append(message))
    return heard


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_the_base_loads_without_a_warning_in_plain_transformers(family, tmp_path, loud):
    model = make_model(family)
    inputs = prompt_for(family)
    plain = logits(model, inputs)
    patch_model(model, steer(family)).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "steer_config.json",
    ]
    assert not any("hf_steer" in path.read_text() for path in tmp_path.glob("*.json") if path.name != "steer_config.json")
    auto = AutoModelForImageTextToText if family == "qwen2_vl" else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = auto.from_pretrained(tmp_path)
    assert loud == []
    assert torch.equal(logits(loaded.eval(), inputs), plain)
    saved = SteerConfig.from_pretrained(tmp_path)
    assert saved == dataclasses.replace(steer(family), base_model_type=family)


def test_saving_twice_and_saving_the_steering_alone(tmp_path):
    model = patch_model(make_model("llama"), steer("llama"))
    hf_steer.save_steering(model, tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["steer_config.json"]
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    inputs = prompt_for("llama")
    for source in (tmp_path / "alone", str(tmp_path / "alone"), SteerConfig.from_pretrained(tmp_path / "alone"), None):
        loaded = hf_steer.from_pretrained(tmp_path / "base", steer_config=source).eval()
        assert torch.equal(logits(loaded, inputs, gaze("llama", inputs)), logits(model, inputs, gaze("llama", inputs)))


def test_a_steering_comes_from_the_hub_like_the_model(tmp_path):
    model = patch_model(make_model("llama"), steer("llama"))
    model.save_pretrained(tmp_path / "base")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    steering = {"steer_config.json": contents.pop("steer_config.json")}
    cache = tmp_path / "cache"
    make_hub_cache(cache, "someone/base", contents)
    make_hub_cache(cache, "someone/steering", steering)
    loaded = hf_steer.from_pretrained("someone/base", steer_config="someone/steering", cache_dir=cache)
    assert hf_steer.get_steer_status(loaded).config.attention == steer("llama").attention
    with pytest.raises(FileError, match="someone/base"):
        hf_steer.from_pretrained("someone/base", cache_dir=cache)


def test_loading_arguments_are_passed_through(tmp_path, monkeypatch):
    patch_model(make_model("qwen2_vl"), steer("qwen2_vl")).save_pretrained(tmp_path)
    passed = {}
    real = transformers.Qwen2VLForConditionalGeneration.from_pretrained.__func__

    def spy(cls, *args, **kwargs):
        passed.update(kwargs)
        return real(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.Qwen2VLForConditionalGeneration, "from_pretrained", classmethod(spy))
    wanted = {"dtype": torch.bfloat16, "attn_implementation": "eager", "device_map": {"": "cpu"}, "revision": "main"}
    loaded = hf_steer.from_pretrained(tmp_path, **wanted)
    assert passed == {**wanted, "output_loading_info": True}
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert type(loaded) is transformers.Qwen2VLForConditionalGeneration
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in prompt_for("qwen2_vl").items()}
    assert torch.isfinite(logits(loaded.eval(), inputs)).all()


def break_config(change):
    def apply(folder):
        path = folder / "steer_config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    return apply


def truncate(name):
    def apply(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    return apply


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (truncate("steer_config.json"), FileError, r"steer_config\.json is not valid JSON"),
        (truncate("config.json"), FileError, "no model configuration that transformers can read"),
        (lambda folder: (folder / "config.json").unlink(), FileError, "no model configuration"),
        (lambda folder: (folder / "steer_config.json").unlink(), FileError, r"has no steer_config\.json"),
        (break_config(lambda values: values.update(schema_version=7)), ConfigError, "schema_version 7.*Upgrade"),
        (break_config(lambda values: values.update(surprise=1)), ConfigError, "has no 'surprise'"),
        (
            break_config(lambda values: values.update(base_model_type="qwen2_vl")),
            ConfigError,
            "saved with a 'qwen2_vl' model; this one is 'llama'",
        ),
        (
            break_config(lambda values: values["attention"].update(heads={"7": [0]})),
            ConfigError,
            "heads: layer 7 is not there.*3 layers",
        ),
    ],
)
def test_a_broken_folder_is_one_error_before_any_weight_is_read(harm, error, message, tmp_path, monkeypatch):
    patch_model(make_model("llama"), steer("llama")).save_pretrained(tmp_path)
    harm(tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=message):
        hf_steer.from_pretrained(tmp_path)


def write_weights(change):
    def apply(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
    return apply


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate("model.safetensors"), "weights of .* cannot be read .* Save or download"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights of .* cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not weights at all"), "cannot be read"),
        (write_weights(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")), "lack 1 of .*layers.1.mlp.up_proj"),
        (write_weights(lambda weights: weights.update({"model.norm.weight": torch.ones(31)})), "belong to another model"),
        (write_weights(lambda weights: [weights.pop(name) for name in list(weights)[1:]]), "lack [0-9]+ of the model's"),
    ],
)
def test_broken_weights_are_one_error_and_nothing_is_half_loaded(harm, message, tmp_path):
    patch_model(make_model("llama"), steer("llama")).save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(FileError, match=message):
        hf_steer.from_pretrained(tmp_path)


def test_an_architecture_that_transformers_lacks_is_an_error(tmp_path):
    patch_model(make_model("llama"), steer("llama")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "MyLlama"))
    with pytest.raises(PatchError, match=r"architectures \['MyLlama'\].*patch_model\(model, config\)"):
        hf_steer.from_pretrained(tmp_path)


def test_saving_and_pushing_uploads_the_folder_with_the_steering_in_it(tmp_path, monkeypatch):
    model = patch_model(make_model("llama"), steer("llama"))
    pushed = []

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "upload")
        pushed.append((repo_id, kwargs, sorted(path.name for path in (tmp_path / "upload").iterdir())))

    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", push_to_hub)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t")
    assert pushed[0][0] == "mine"
    assert pushed[0][1] == {"token": "t"}
    assert "steer_config.json" in pushed[0][2]
    assert (tmp_path / "mine" / "steer_config.json").exists()
