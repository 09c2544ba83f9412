"""torch.compile without graph breaks or recompilation, and steps that never wait for the device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from kit.gazing import SEEING, TOLERANCE, gaze, prompt_for, steer
from kit.tiny import make_model
from kit.versions import cached
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_steer import GateConfig, Saliency, disable_steering, patch_model, use_saliency, use_strength
from hf_steer.patching.gaze.learned import LearnedStrengths

BACKEND = "aot_eager"
"""Traces forward and backward as inductor does, and generates no code: no C++ compiler is needed."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def learn(model, value=1.5):
    """Learned strengths that are not the zeros that they start as."""
    for module in model.modules():
        if isinstance(module, LearnedStrengths):
            for number, parameter in enumerate(module.parameters()):
                torch.nn.init.constant_(parameter, value + number)


def patched(family, implementation="sdpa", **attention):
    model = patch_model(make_model(family, implementation), steer(family, **attention))
    learn(model)
    return model


def generated(model, inputs, said, compiled):
    settings = CompileConfig(fullgraph=True, backend=BACKEND, mode=None)
    settings._compile_all_devices = True  # transformers compiles by itself on GPUs only
    with nullcontext() if said is None else use_saliency(model, said):
        out = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static", output_logits=True,
            return_dict_in_generate=True, disable_compile=not compiled, compile_config=settings,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize(
    ("family", "implementation", "attention"),
    [
        ("qwen2", "sdpa", {}),
        ("qwen2", "eager", {"preserve_mass": True}),
        ("qwen2_vl", "sdpa", {"preserve_mass": True}),
        ("qwen3_vl", "eager", {}),
        ("llama", "sdpa", {"backend": "folded"}),
        ("llama", "sdpa", {"heads": {1: (0, 3), 2: "all"}, "strength": {1: {0: 1.0, 3: 2.0}, 2: 3.0}, "queries": "generated"}),
        ("qwen3", "sdpa", {"gate": GateConfig("entropy", threshold=0.5, release=0.3)}),
        ("qwen2", "sdpa", {"strength": "trainable"}),
    ],
)
def test_compiled_generation_equals_uncompiled_and_a_new_prompt_is_not_compiled_again(family, implementation, attention):
    model = patched(family, implementation, **attention)
    first, second = prompt_for(family), prompt_for(family)
    second["input_ids"] = torch.where(second["input_ids"] < 80, (second["input_ids"] + 7).clamp(max=79), second["input_ids"])
    second["input_ids"][second["attention_mask"] == 0] = first["input_ids"][second["attention_mask"] == 0]
    graphs, outputs = [], []
    for number, inputs in enumerate((first, second)):
        said = gaze(family, inputs, number)
        expected = generated(model, inputs, said, compiled=False)
        torch.testing.assert_close(generated(model, inputs, said, compiled=True), expected, **TOLERANCE)
        graphs.append(counters["stats"]["unique_graphs"])
        outputs.append(expected)
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]
    assert not counters["graph_break"]
    with disable_steering(model):
        assert (generated(model, second, None, compiled=False) - outputs[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "attention",
    [{}, {"preserve_mass": True, "backend": "folded"}, {"queries": "generated"}, {"strength": "trainable"}, {"normalize": "none"}],
    ids=str,
)
def test_a_compiled_prompt_equals_the_uncompiled_one_and_a_new_one_is_not_compiled_again(attention, padded):
    model = patched("qwen2", **attention)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    inputs = prompt_for("qwen2", rows=[[9], [6 if padded else 9]])
    if not padded:
        del inputs["attention_mask"]
    graphs, outputs = [], []
    for number in range(3):
        said = gaze("qwen2", inputs, number)
        with use_saliency(model, said):
            expected = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, expected, **TOLERANCE)
        graphs.append(counters["stats"]["unique_graphs"])
        outputs.append(expected)
    assert graphs[0] == graphs[-1] > 0
    assert (outputs[0] - outputs[1]).abs().max() > 0.1  # what is said is no constant of the graph


def test_compiled_training_has_the_same_loss_and_gradients():
    model = patched("qwen2", strength="trainable", queries="generated")
    inputs = prompt_for("qwen2", rows=[[9], [6]])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, :-4] = -100
    found = []
    for call in (model, torch.compile(model, fullgraph=True, backend=BACKEND)):
        with use_saliency(model, gaze("qwen2", inputs)):
            loss = call(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.hf_steer.learned.parameters())])
        model.zero_grad(set_to_none=True)
    assert len(found[0]) == 3
    assert all(gradient.abs().max() > 0 for gradient in found[0][1:])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@torch.no_grad()
def test_a_loop_of_ones_own_compiles_its_steps():
    model = patched("qwen2")
    inputs = prompt_for("qwen2", rows=[[9], [9]])
    step = torch.compile(model, fullgraph=True, backend=BACKEND)
    found = []
    for run in (model, step):
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits, graphs = [], []
        with use_saliency(model, gaze("qwen2", inputs)):
            out = model(input_ids=inputs["input_ids"], **cached(cache))
            for _ in range(5):
                logits.append(out.logits[:, -1])
                out = run(input_ids=out.logits[:, -1:].argmax(-1), **cached(cache))
                graphs.append(counters["stats"]["unique_graphs"])
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)
    assert graphs[0] == graphs[-1] > 0


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device, if that were a GPU."""

    WAITING = ("local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique", "masked_select")
    LEAVING = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        for name in self.LEAVING:
            self.patches.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").lstrip("_")
        indices = [own for arg in args if isinstance(arg, (list, tuple)) for own in arg if isinstance(own, torch.Tensor)]
        by_mask = name.startswith("index") and any(own.dtype == torch.bool for own in indices)
        repeats = name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)
        self.count += name.startswith(self.WAITING) or by_mask or repeats
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.any()), lambda x: x.sum().item(), lambda x: int(x.max()), lambda x: x.tolist(), lambda x: x.unique(),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x), lambda x: x.masked_select(x > 0), lambda x: range(5)[x[0]],
    ],
)  # fmt: skip
def test_waits_are_noticed(wait):
    with Waits() as counted:
        wait(torch.ones(3, dtype=torch.long))
    assert counted.count > 0


def test_work_without_waits_is_not_counted():
    with Waits() as counted:
        x = torch.ones(3, 4)
        torch.where(x > 0, x @ x.T[:, :1], 0)[:, torch.tensor([0, 0])].softmax(-1).repeat_interleave(2, 0)
    assert counted.count == 0


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize(
    "attention", [{}, {"preserve_mass": True}, {"queries": "generated"}, {"gate": GateConfig("margin")}], ids=str
)
def test_no_step_waits_for_the_device(family, cache, attention):
    model = patched(family, **attention)
    inputs = prompt_for(family, rows=[[9], [6]])
    waits = {}
    for steered in (True, False):
        kept = StaticCache(config=model.config, max_cache_len=24) if cache == "static" else DynamicCache(config=model.config)
        said = Saliency.from_tokens(torch.randn(inputs["input_ids"].shape))
        with use_saliency(model, said) if steered else disable_steering(model):
            out = model(**inputs, **cached(kept))
            mask = inputs["attention_mask"]
            for _ in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                more = {"position_ids": mask.cumsum(1)[:, -1:] - 1}
                if family in SEEING:
                    more["position_ids"] = more["position_ids"].expand(3, -1, -1)
                with Waits() as counted:
                    out = model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=mask, **cached(kept), **more)
        waits[steered] = counted.count
    assert waits[True] == waits[False]


@torch.no_grad()
def test_a_static_cache_that_was_reset_forgets_its_saliency():
    model = patched("qwen2")
    inputs = prompt_for("qwen2", rows=[[5]])
    cache = StaticCache(config=model.config, max_cache_len=12)
    with use_saliency(model, gaze("qwen2", inputs)):
        model(input_ids=inputs["input_ids"], **cached(cache))
    cache.reset()
    first, second = inputs["input_ids"][:, :1], inputs["input_ids"][:, 1:2]
    with disable_steering(model):
        expected = model(input_ids=inputs["input_ids"][:, :2]).logits[:, 1:]
    model(input_ids=first, **cached(cache))  # one token at a time: nothing here looks at how full the cache is
    torch.testing.assert_close(model(input_ids=second, **cached(cache)).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_strength_in_force_compiles_too():
    model = patched("qwen2")
    inputs = prompt_for("qwen2", rows=[[9]])
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for strength in (0.5, 4.0):
        with use_saliency(model, gaze("qwen2", inputs)), use_strength(model, strength):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **TOLERANCE)
