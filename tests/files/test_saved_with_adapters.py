"""Whatever saves an adapter of PEFT saves the aligner beside it, and whatever loads or resumes finds it: no further call."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from kit.aligning import align, logits, stir
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model
from kit.trainers import Sounds, arguments, steering_of
from transformers import Trainer, TrainerCallback

import hf_steer
from hf_steer import AttentionConfig, FileError, PatchError, SaliencyConfig, SteerConfig, patch_model, unpatch_model
from hf_steer.training import train_steering

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def make(order, kind="simple", **lora):
    """A model with adapter and aligner, both trainable; what Trainer takes."""
    torch.manual_seed(0)
    base, config = make_encoder_model("whisper"), align("whisper", "output", kind)
    settings = peft.LoraConfig(**{**LORA, **lora})
    if order == "adapter first":
        model = peft.get_peft_model(base, settings)
        patch_model(model.get_base_model(), config)
        return model
    patch_model(base, config)
    if order == "add_adapter":
        try:
            base.add_adapter(settings)
        except ValueError as error:  # transformers 5.24 wants PEFT 0.22
            pytest.skip(str(error)) if "version of PEFT" in str(error) else pytest.fail(str(error))
        model = base
    else:
        model = peft.get_peft_model(base, settings)
    train_steering(model)
    return model


def inner(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def outputs(model):
    return logits(model.eval(), make_encoder_inputs("whisper"))


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "hf_steer" in name or "lora_" in name}


ORDERS = ["adapter first", "aligner first"]
every = pytest.mark.parametrize("order", [*ORDERS, "add_adapter"])


@pytest.mark.parametrize("order", ORDERS)
def test_pefts_save_holds_the_aligner_and_its_load_finds_it(order, tmp_path):
    model = make(order)
    stir(inner(model))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"adapter_model.safetensors", "steer_model.safetensors"}
    assert not list(tmp_path.glob(".*"))
    torch.manual_seed(5)
    fresh = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(outputs(loaded), outputs(model))
    stir(inner(model), seed=9)
    assert not torch.equal(outputs(loaded), outputs(model))
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(outputs(loaded), outputs(model))


@every
def test_trainer_saves_and_resumes_adapter_and_aligner(order, tmp_path):
    model = make(order)
    start = weights(model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Sounds())
    trainer.train()
    trained = weights(model)
    learned = [name for name, value in trained.items() if not torch.equal(value, start[name])]
    assert any("lora_" in name for name in learned)
    assert any("hf_steer" in name for name in learned)
    held = {path.name for path in (tmp_path / "checkpoint-3").rglob("*.safetensors")}
    assert held - {"model.safetensors"} == {"adapter_model.safetensors", "steer_model.safetensors"}

    begun = {}

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            begun.update(weights(model))

    again = Trainer(model=make(order), args=arguments(tmp_path), train_dataset=Sounds(), callbacks=[Begin()])
    again.train(resume_from_checkpoint=True)
    assert begun
    assert all(torch.equal(value, trained[name]) for name, value in begun.items())
    middle = make(order)
    second = Trainer(model=middle, args=arguments(tmp_path / "elsewhere"), train_dataset=Sounds())
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in weights(middle).items():
        torch.testing.assert_close(value, trained[name])

    trainer.save_model(str(tmp_path / "final"))
    final = tmp_path / "final"
    assert {path.name for path in final.rglob("*.safetensors")} == {"adapter_model.safetensors", "steer_model.safetensors"}
    plain = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(final))
    if order == "add_adapter":
        plain.load_adapter(str(final))
        hf_steer.load_steering(plain, final)
    else:
        plain = peft.PeftModel.from_pretrained(plain, str(final))
    assert torch.equal(outputs(plain), outputs(model))


def test_the_best_checkpoint_brings_its_aligner_back(tmp_path):
    model = make("aligner first")
    best = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=best, train_dataset=Sounds(), eval_dataset=Sounds())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    expected = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(tmp_path / "checkpoint-3"))
    hf_steer.load_steering(expected, tmp_path / "checkpoint-3")
    found = steering_of(inner(model))
    assert all(torch.equal(value, found[name]) for name, value in steering_of(expected).items())


def test_a_second_adapter_has_the_aligner_in_its_own_folder(tmp_path):
    model = make("aligner first")
    model.add_adapter("other", peft.LoraConfig(**LORA))
    stir(inner(model))
    model.save_pretrained(tmp_path)
    fresh = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "other"), adapter_name="other")
    model.set_adapter("other")
    assert torch.equal(outputs(loaded), outputs(model))


def test_prompt_tuning_saves_the_aligner_as_well(tmp_path):
    model = patch_model(make_encoder_model("llava"), align("llava", "output", "simple"))
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32,
                                                                 num_attention_heads=4, num_layers=3))  # fmt: skip
    stir(model)
    wrapped.save_pretrained(tmp_path)
    other = patch_model(make_encoder_model("llava"), SteerConfig.from_pretrained(tmp_path))
    hf_steer.load_steering(other, tmp_path)
    assert torch.equal(other.hf_steer.aligners[0].router.weight, model.hf_steer.aligners[0].router.weight)


def test_a_card_that_someone_wrote_stays_and_a_kill_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = make("aligner first")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nWhat it is for.\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stir(inner(model))

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("hf_steer.patching.with_peft.write_steering", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    model.save_pretrained(tmp_path)
    assert "What it is for." in card.read_text()


def test_a_checkpoint_without_the_aligner_is_not_resumed_from(tmp_path):
    unaligned = peft.get_peft_model(make_encoder_model("whisper"), peft.LoraConfig(**LORA))
    Trainer(model=unaligned, args=arguments(tmp_path, max_steps=3), train_dataset=Sounds()).train()
    assert not (tmp_path / "checkpoint-3" / "steer_config.json").exists()
    trainer = Trainer(model=make("aligner first"), args=arguments(tmp_path), train_dataset=Sounds())
    with pytest.raises(FileError, match="an adapter and without a steering.*Resume from one"):
        trainer.train(resume_from_checkpoint=True)
    other = make("aligner first", "progressive")
    make("aligner first").save_pretrained(tmp_path / "simple")
    before = weights(other)
    with pytest.raises(FileError, match="has aligners .*'simple'.*was patched with .*'progressive'"):
        other.load_adapter(str(tmp_path / "simple"), "default")
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())


@pytest.mark.parametrize("patched", ["never", "no more", "gaze"])
def test_peft_does_what_it_did_where_nothing_is_trained_by_us(patched, tmp_path):
    family = "llava" if patched == "gaze" else "whisper"
    base = make_encoder_model(family)
    if patched == "gaze":
        patch_model(base, SteerConfig(attention=AttentionConfig(saliency=SaliencyConfig(source=None))))
    elif patched == "no more":
        unpatch_model(patch_model(base, align("whisper", "output", "simple")))
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(make_encoder_model(family), str(tmp_path))
    expected = logits(model.eval(), make_encoder_inputs(family))
    assert torch.equal(logits(loaded.eval(), make_encoder_inputs(family)), expected)


@pytest.mark.parametrize("name", ["hf_steer", "aligners"])
def test_modules_to_save_is_refused_with_what_to_do_instead(name):
    model = patch_model(make_encoder_model("whisper"), align("whisper", "output", "simple"))
    with pytest.raises(PatchError, match="leave 'hf_steer' .* out of it.*train_steering.*saved with the adapter"):
        peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=[name]))


def test_a_part_that_holds_a_hook_of_ours_is_not_copied_with_the_whole_model():
    model = patch_model(make_encoder_model("llava"), align("llava", "output", "simple"))
    with pytest.raises(PatchError, match="train_projector=True"):
        copy.deepcopy(model.model.multi_modal_projector)
    stir(model)
    copied = copy.deepcopy(model)
    assert copied.hf_steer.plan.anatomy.root is copied
    stir(copied)
    assert not torch.equal(copied.hf_steer.aligners[0].router.weight, model.hf_steer.aligners[0].router.weight)


def test_adapters_alone_still_load_into_a_model_with_aligners():
    model = make("add_adapter")
    own = {name: value + 1 for name, value in model.state_dict().items() if "lora_" in name}
    before = steering_of(model)
    model.load_state_dict(own, strict=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert all(torch.equal(value, before[name]) for name, value in steering_of(model).items())


def test_adapters_of_transformers_train_with_the_aligner(tmp_path):
    model = make("add_adapter")
    inputs = make_encoder_inputs("whisper")
    model.train()(**inputs, labels=labels_for("whisper", inputs)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "hf_steer" in name or "lora_" in name)
    stir(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert json.loads((tmp_path / "steer_config.json").read_text())["saved"]["base"] is False
    again = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(tmp_path))
    again.load_adapter(str(tmp_path))
    hf_steer.load_steering(again, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
