"""Training as people do it: Trainer, accelerate, PEFT, offload, several processes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from kit.aligning import TOLERANCE, align, aligned, logits, stir
from kit.tiny_encoders import labels_for, make_encoder_inputs, make_encoder_model
from kit.trainers import Sounds, arguments, steering_of, whisper
from transformers import Trainer, TrainerCallback

import hf_steer
from hf_steer import FileError, PatchError, SteerConfig, patch_model, unpatch_model
from hf_steer.training import checkpoint_with, log_routing, train_steering

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["progressive", "layer_wise"])
def test_a_plain_trainer_trains_checkpoints_and_resumes(kind, tmp_path):
    model = whisper(kind)
    base = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("hf_steer.")}
    before = steering_of(model)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=Sounds()).train()
    trained = steering_of(model)
    assert all(not torch.equal(value, before[name]) for name, value in trained.items())
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items() if name in base)

    checkpoint = tmp_path / "checkpoint-3"
    whole = sum(value.numel() * value.element_size() for value in base.values())
    sizes = {path.name: path.stat().st_size for path in checkpoint.rglob("*.safetensors")}
    assert set(sizes) == {"model.safetensors", "steer_model.safetensors"}
    assert sum(sizes.values()) < 0.5 * whole
    assert not (checkpoint / "config.json").exists()  # it is no model, and nothing shall load it as one

    resumed = whisper(kind)
    trainer = Trainer(model=resumed, args=arguments(tmp_path), train_dataset=Sounds())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, value in steering_of(resumed).items():
        torch.testing.assert_close(value, trained[name])
    trainer.save_model(tmp_path / "final")
    loaded = hf_steer.from_pretrained(tmp_path / "final").eval()
    inputs = make_encoder_inputs("whisper")
    assert torch.equal(logits(loaded, inputs), logits(resumed.eval(), inputs))
    steered = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(checkpoint))
    hf_steer.load_steering(steered, checkpoint)
    assert not torch.equal(logits(steered, inputs), logits(resumed, inputs))  # step 3 is not step 6


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = whisper()
    best = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=best, train_dataset=Sounds(), eval_dataset=Sounds())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    step_three = patch_model(make_encoder_model("whisper"), SteerConfig.from_pretrained(tmp_path / "checkpoint-3"))
    hf_steer.load_steering(step_three, tmp_path / "checkpoint-3")
    for name, value in steering_of(model).items():
        torch.testing.assert_close(value, step_three.state_dict()[name])


def test_a_base_that_trains_along_is_saved_whole(tmp_path):
    model = make_encoder_model("whisper")
    patch_model(model, align("whisper", "output", "progressive"), freeze_base=False)
    Trainer(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=Sounds()).train()
    loaded = hf_steer.from_pretrained(tmp_path / "checkpoint-3").eval()
    inputs = make_encoder_inputs("whisper")
    assert torch.equal(logits(loaded, inputs), logits(model.eval(), inputs))


def test_a_checkpoint_of_another_aligner_is_refused(tmp_path):
    Trainer(model=whisper(), args=arguments(tmp_path, max_steps=3), train_dataset=Sounds()).train()
    other = Trainer(model=whisper("simple"), args=arguments(tmp_path), train_dataset=Sounds())
    with pytest.raises(FileError, match=r"has shape \(24, 16\) in this checkpoint, needed is \(8, 16\).*Patch with the steer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_of_the_steering_alone_are_complete_and_a_part_of_them_is_not():
    model = whisper()
    own = {name: value + 1 for name, value in steering_of(model).items()}
    loaded = model.load_state_dict(own, strict=False)
    assert loaded.missing_keys == []
    assert loaded.unexpected_keys == []
    assert all(torch.equal(value, own[name]) for name, value in steering_of(model).items())
    with pytest.raises(FileError, match=r"holds another steering: hf_steer\.aligners\.0\.router\.weight missing, nothing"):
        model.load_state_dict({name: value for name, value in own.items() if not name.endswith("router.weight")}, strict=False)
    with pytest.raises(FileError, match="nothing missing, hf_steer.other unexpected"):
        model.load_state_dict({**own, "hf_steer.other": torch.zeros(1)}, strict=False)
    base = {name: value for name, value in model.state_dict().items() if not name.startswith("hf_steer.")}
    assert sorted(model.load_state_dict(base, strict=False).missing_keys) == sorted(own)  # plain base weights: as ever


def test_routing_goes_to_whatever_the_trainer_reports_to(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = Trainer(model=whisper(num_experts=4), args=arguments(tmp_path), train_dataset=Sounds(), callbacks=[Tracker()])
    log_routing(trainer)
    trainer.train()
    logged = [row for row in seen if any(name.startswith("routing/") for name in row)]
    assert len(logged) == 3  # every second of six steps
    usage = [logged[-1][f"routing/audio.output/stage_0/usage/{expert}"] for expert in range(4)]
    assert sum(usage) == pytest.approx(1.0, abs=1e-5)
    assert 0 < logged[-1]["routing/audio.output/stage_2/entropy"] <= 1.3863
    assert any("routing/audio.output/stage_0/entropy" in row for row in trainer.state.log_history)
    seen.clear()
    with torch.no_grad():
        trainer.model(**make_encoder_inputs("whisper"))
    assert seen == []
    by_epoch = Trainer(model=whisper(), args=arguments(tmp_path, logging_strategy="epoch"), train_dataset=Sounds())
    log_routing(by_epoch)
    by_epoch.train()
    assert any(name.startswith("routing/") for row in by_epoch.state.log_history for name in row)
    with pytest.raises(PatchError, match="is not patched"):
        log_routing(Trainer(model=make_encoder_model("whisper"), args=arguments(tmp_path)))


def test_an_accelerate_loop_trains_and_saves_the_steering_alone(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoint_with(accelerator)
    model = whisper()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Sounds(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in [*loader] * 3:
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    accelerator.save_state(str(tmp_path / "state"))
    saved = sorted(path.name for path in (tmp_path / "state").rglob("*.safetensors"))
    assert saved == ["steer_model.safetensors"]
    trained = steering_of(model)
    stir(model)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(value, trained[name]) for name, value in steering_of(model).items())


def test_accelerate_saves_all_of_a_model_that_trains_more(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoint_with(accelerator)
    model = patch_model(make_encoder_model("whisper"), align("whisper", "output", "simple"), freeze_base=False)
    model = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_steering_without_weights_is_loaded_without_them(tmp_path):
    gaze = SteerConfig(attention=hf_steer.AttentionConfig(saliency=hf_steer.SaliencyConfig(source=None)))
    model = patch_model(make_encoder_model("llava"), gaze)
    hf_steer.save_steering(model, tmp_path)
    hf_steer.load_steering(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["steer_config.json"]


def test_what_is_offloaded_is_refused_and_not_lost(tmp_path):
    model = aligned("llava", "output", "simple")
    hf_steer.save_steering(model, tmp_path)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(FileError, match="cannot be loaded while accelerate has it offloaded"):
        hf_steer.load_steering(model, tmp_path)
    with pytest.raises(FileError, match="cannot be saved while accelerate has it offloaded"):
        hf_steer.save_steering(model, tmp_path / "other")


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen2_audio", "llava"])
def test_lora_on_the_same_model(order, family, tmp_path):
    """Adapters first or aligners first: both train, neither sees the other's weights, and taking back is exact."""
    model = make_encoder_model(family)
    inputs = make_encoder_inputs(family)
    torch.manual_seed(0)
    if order == "before":
        wrapped = lora(model)
        plain = logits(wrapped, inputs)
        patch_model(wrapped.get_base_model(), align(family, "output", "progressive"))
        assert torch.equal(logits(wrapped, inputs), plain)
    else:
        patch_model(model, align(family, "output", "progressive"))
        wrapped = lora(model)
        plain = logits(wrapped, inputs)
        assert not any(p.requires_grad for name, p in wrapped.named_parameters() if "hf_steer" in name)
        with pytest.warns(UserWarning, match=r"aligners are frozen.*get_peft_model.*train_steering"):
            wrapped.train()(**inputs, labels=labels_for(family, inputs))
        train_steering(wrapped)
    stir(wrapped.get_base_model())
    assert (logits(wrapped.eval(), inputs) - plain).abs().max() > 0.01
    frozen = {name: value.clone() for name, value in wrapped.named_parameters() if not value.requires_grad}
    wrapped.train()(**inputs, labels=labels_for(family, inputs)).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if "hf_steer" in name or ("lora_" in name and "language_model" in name):
            assert parameter.grad is not None, name
        assert (parameter.grad is None) or "hf_steer" in name or "lora_" in name
    assert not any("lora_" in name for name, _ in wrapped.get_base_model().hf_steer.named_parameters())
    assert not any("lora_" in name or "hf_steer" in name for name in frozen)
    hf_steer.save_steering(wrapped, tmp_path)
    trained = steering_of(wrapped.get_base_model())
    stir(wrapped.get_base_model(), seed=9)
    hf_steer.load_steering(wrapped, tmp_path)
    assert all(torch.equal(value, trained[name]) for name, value in steering_of(wrapped.get_base_model()).items())
    unpatch_model(wrapped.get_base_model())
    assert torch.equal(logits(wrapped.eval(), inputs), plain)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), plain, **TOLERANCE)


def test_merging_lora_leaves_the_aligner_in_place():
    model = aligned("llava", "layers", "layer_wise")
    inputs = make_encoder_inputs("llava")
    torch.manual_seed(0)
    wrapped = lora(model)
    expected = logits(wrapped, inputs)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, **TOLERANCE)
    assert hf_steer.get_steer_status(merged).aligners == ("layer_wise at image layers",)


def test_all_linear_leaves_the_routers_alone():
    model = aligned("llava", "output", "hierarchical")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert not any("hf_steer" in name and "lora_" in name for name, _ in wrapped.named_parameters())


def test_with_peft_the_trainers_checkpoints_hold_both(tmp_path):
    torch.manual_seed(0)
    wrapped = lora(whisper())
    train_steering(wrapped)
    trainer = Trainer(model=wrapped, args=arguments(tmp_path), train_dataset=Sounds())
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-3").rglob("*.safetensors")}
    assert names == {"adapter_model.safetensors", "steer_model.safetensors"}
    trained = steering_of(wrapped.get_base_model())
    torch.manual_seed(0)
    again = lora(whisper())
    train_steering(again)
    second = Trainer(model=again, args=arguments(tmp_path), train_dataset=Sounds())
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in steering_of(again.get_base_model()).items():
        torch.testing.assert_close(value, trained[name])
    third = Trainer(model=again, args=arguments(tmp_path / "elsewhere"), train_dataset=Sounds())
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in steering_of(again.get_base_model()).items():
        torch.testing.assert_close(value, trained[name])


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("family", "placement", "kind"),
    [("whisper", "layers", "layer_wise"), ("llava", "output", "hierarchical"), ("qwen2_vl", "output", "progressive"),
     ("llava", "projector", "modality_specific"), ("qwen2_vl", "projector", "cross_modal_adapter")],
)  # fmt: skip
def test_offloaded_models_are_aligned(family, placement, kind, order, offload, tmp_path):
    expected = logits(aligned(family, placement, kind), make_encoder_inputs(family))
    model = make_encoder_model(family)
    reference = aligned(family, placement, kind)

    def give_away(which):
        if offload == "cpu":
            return cpu_offload(which, execution_device=torch.device("cpu"))
        return disk_offload(which, str(tmp_path), execution_device=torch.device("cpu"))

    if order == "after":
        model = give_away(copy.deepcopy(reference))
    else:
        model = give_away(model)
        patch_model(model, align(family, placement, kind))
        assert not any(parameter.is_meta for parameter in model.hf_steer.parameters())
        with torch.no_grad():
            for own, other in zip(model.hf_steer.parameters(), reference.hf_steer.parameters(), strict=True):
                own.copy_(other)
    torch.testing.assert_close(logits(model, make_encoder_inputs(family)), expected)


def test_a_device_map_is_taken_at_loading(tmp_path):
    model = aligned("llava", "output", "hierarchical")
    inputs = make_encoder_inputs("llava")
    model.save_pretrained(tmp_path)
    loaded = hf_steer.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def torchrun(script, processes, *arguments):
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*runner, str(HERE / "kit" / script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE).group(1))


def test_two_processes_give_the_loss_curve_of_one_with_the_doubled_batch():
    """DDP on gloo through Trainer, with the load-balancing loss."""
    two, one = torchrun("run_distributed.py", 2, "ddp", "2"), torchrun("run_distributed.py", 1, "ddp", "4")
    assert len(two["losses"]) == 4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert two["losses"][0] != pytest.approx(two["losses"][-1], rel=1e-3)


def test_fsdp2_shards_the_base_with_the_aligner_attached(tmp_path):
    one = torchrun("run_distributed.py", 1, "plain", str(tmp_path / "one"))
    two = torchrun("run_distributed.py", 2, "fsdp", str(tmp_path / "two"))
    assert two["sharded"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    results = []
    for folder in ("one", "two"):
        model = patch_model(make_encoder_model("llava"), SteerConfig.from_pretrained(tmp_path / folder))
        hf_steer.load_steering(model, tmp_path / folder)
        results.append(logits(model, make_encoder_inputs("llava")))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_nothing_to_train_is_said_at_once():
    gaze = SteerConfig(attention=hf_steer.AttentionConfig(saliency=hf_steer.SaliencyConfig(source=None)))
    model = patch_model(make_encoder_model("llava"), gaze)
    with pytest.raises(PatchError, match="nothing to train: no aligners"):
        train_steering(model)
