"""A patched model that was pickled, saved whole, copied or sent to another process is a patched model there."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import visitor
from kit.asking import generate, logits, look, plain_logits, prompt, saying, steer, steered
from kit.tiny import make_model
from torch import nn

from hf_steer import PatchError, disable_steering, get_steer_status, patch_model, unpatch_model

ROOT = Path(__file__).parents[2]
VISITOR = ROOT / "tests" / "kit" / "visitor.py"


def as_pickle(model):
    return pickle.loads(pickle.dumps(model))


def as_torch(model):
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


def reference(implementation):
    model, inputs = steered("qwen2", implementation=implementation), prompt("qwen2")
    said = look(inputs)
    expected = {
        "steered": logits(model, inputs, said), "plain": plain_logits(model, inputs), "unpatched": plain_logits(model, inputs),
        "tokens": generate(model, inputs, said, max_new_tokens=4),
    }  # fmt: skip
    assert not torch.equal(expected["steered"], expected["plain"])
    return model, (inputs, said.tokens), expected


@pytest.mark.parametrize("copied", [as_pickle, as_torch, copy.deepcopy])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_copy_in_the_same_process_is_steered_and_independent(family, copied):
    model, inputs = steered(family), prompt(family)
    said = saying(family, inputs)
    expected, plain = logits(model, inputs, said), plain_logits(model, inputs)
    twin = copied(model)
    assert torch.equal(logits(twin, inputs, said), expected)
    assert torch.equal(generate(twin, inputs, said), generate(model, inputs, said))
    with disable_steering(model):
        assert torch.equal(logits(twin, inputs, said), expected)
    unpatch_model(model)
    assert get_steer_status(twin).patched
    assert torch.equal(logits(twin, inputs, said), expected)
    assert torch.equal(logits(unpatch_model(twin), inputs), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_file_is_a_patched_model_in_a_process_that_never_patched(kind, implementation, tmp_path):
    model, call, expected = reference(implementation)
    if kind == "pickle":
        (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.torch")
    torch.save(call, tmp_path / "call.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(VISITOR), kind, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-1500:]
    said = torch.load(tmp_path / "said.pt", weights_only=False)
    assert all(torch.equal(said[name], value) for name, value in expected.items())
    assert said["status"] == str(get_steer_status(model).heads)


def test_a_spawned_process_steers():
    model, call, expected = reference("sdpa")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=visitor.spawned, args=(theirs, model, call))
    process.start()
    theirs.close()
    assert ours.poll(300)
    said = ours.recv()
    process.join(60)
    assert isinstance(said, dict), said
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(said[name], dtype=value.dtype), value)


def test_a_shared_copy_of_an_unpatched_model_is_unpatched():
    model = unpatch_model(steered("qwen2"))
    inputs = prompt("qwen2")
    assert not get_steer_status(as_pickle(model)).patched
    assert torch.equal(logits(as_pickle(model), inputs), logits(model, inputs))


def test_a_part_of_a_patched_model_cannot_be_patched():
    model = steered("qwen2_vl")
    before = set(model.state_dict())
    for part in (model.model, model.model.language_model):
        with pytest.raises(PatchError, match="unpatch_model"):
            patch_model(part, steer("qwen2"))
    assert set(model.state_dict()) == before
    assert get_steer_status(model).patched


def test_a_base_inside_a_patched_model_cannot_be_patched():
    model, inputs = steered("qwen2"), prompt("qwen2")
    said = look(inputs)
    expected = logits(model, inputs, said)
    with pytest.raises(PatchError, match="unpatch_model"):
        patch_model(model.model, steer("qwen2"))
    assert torch.equal(logits(model, inputs, said), expected)


def test_a_model_that_holds_a_patched_one_cannot_be_patched():
    model, inputs = make_model("qwen2"), prompt("qwen2")
    patch_model(model.model, steer("qwen2"))
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(PatchError, match="unpatch_model"):
        patch_model(model, steer("qwen2"))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    unpatch_model(model.model)
    patch_model(model, steer("qwen2"))
    assert not torch.equal(logits(model, inputs, look(inputs)), plain_logits(model, inputs))


def test_the_same_patch_again_is_no_nested_patch():
    model = steered("qwen2")
    assert patch_model(model, steer("qwen2")) is model


def test_two_models_side_by_side_in_one_are_both_steered():
    """Neither holds the other."""
    inputs = prompt("qwen2")
    said = look(inputs)
    both = nn.ModuleList([steered("qwen2"), steered("qwen2", seed=1)])
    for model in both:
        assert not torch.equal(logits(model, inputs, said), plain_logits(model, inputs))
