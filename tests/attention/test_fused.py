"""The fused kernel against the fp64 oracle in Triton's interpreter, and its compilation for GPUs that are not there."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from kit.calls import call_of
from kit.gazing import TOLERANCE, gaze, logits, prompt_for, steer
from kit.oracle import attend, rank_one
from kit.tiny import make_model
from torch.nn import functional as F

from hf_steer import patch_model, unpatch_model
from hf_steer.attention.fused import attend_fused, refuse_fused
from hf_steer.values import HeadBias

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

HEADS, KEY_HEADS = 4, 2
KERNELS, LAUNCH = "hf_steer.attention.fused_kernels", "hf_steer.attention.fused_launch"
DECODER = SimpleNamespace(is_causal=True, layer_idx=0)


@pytest.fixture
def interpreter(monkeypatch):
    """Triton decides as a function is decorated whether it is interpreted; its own may be decorated already."""
    from triton import JITFunction, language
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    core, cast = language.core, InterpreterBuilder.cast_impl

    def cast_rounded(self, source, wanted):  # Triton 3.9's interpreter cuts bfloat16 off where GPUs round to the nearest
        if (source.dtype.scalar.name, wanted.scalar.name) != ("fp32", "bf16"):
            return cast(self, source, wanted)
        rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy().reshape(source.data.shape), wanted.scalar)

    # the interpreter leaves its own functions in all of these
    owners = [language, core, language.math, language.standard]
    owners += [core.tensor, core.dtype, core.condition, core.tensor_descriptor_base]
    before = [(owner, dict(vars(owner))) for owner in owners]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounded)
    monkeypatch.setattr(InterpretedFunction, "rewritten_fn", {})  # whose functions need what is taken back below
    for name in (KERNELS, LAUNCH):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, function in before[0][1].items():
        if isinstance(function, JITFunction):
            setattr(language, name, InterpretedFunction(function.fn))
    yield
    for name in (KERNELS, LAUNCH):
        sys.modules.pop(name, None)
    for owner, members in before:
        for name in [name for name, member in vars(owner).items() if member is not members.get(name)]:
            setattr(owner, name, members[name]) if name in members else delattr(owner, name)


def make_case(kind, *, head=64, value=None, dtype=torch.float16, queries=33, keys=33, rank=1, gated=False, batch=2):
    """Leaves in the layout of transformers, who may attend to whom, and the mask that says so."""
    torch.manual_seed(queries * keys + head)
    leaf = {
        "query": torch.randn(batch, queries, HEADS, head).to(dtype).transpose(1, 2),
        "key": torch.randn(batch, keys, KEY_HEADS, head).to(dtype).transpose(1, 2),
        "value": torch.randn(batch, keys, KEY_HEADS, value or head).to(dtype).transpose(1, 2),
        "strength": torch.tensor([1.5, 0.0, -1.0, 0.75])[:, None] + 0.5 * torch.arange(rank),
        "gate": torch.rand(batch, queries if gated else 1, rank) if gated else torch.ones(1, 1, rank),
        "scores": torch.randn(batch, keys, rank),
    }
    lower = torch.ones(queries, keys, dtype=torch.bool).tril(max(0, keys - queries) if "padded" in kind else 0)
    allowed = torch.ones(batch, queries, keys, dtype=torch.bool) if kind == "full" else lower.expand(batch, -1, -1).clone()
    if "padded" in kind:
        allowed[0, :, :5] = False  # its first queries may attend to nothing
    mask = None
    if kind == "padded bool":
        mask = allowed[:, None]
    if kind == "padded float":
        mask = torch.zeros(allowed[:, None].shape, dtype=dtype).masked_fill(~allowed[:, None], torch.finfo(dtype).min)
        mask = mask + torch.linspace(-1, 1, keys).to(dtype) * allowed[:, None]  # like a position bias
    return {name: tensor.requires_grad_() for name, tensor in leaf.items()}, allowed, mask


def bias_of(leaf):
    query = leaf["strength"][None, :, None, :] * leaf["gate"][:, None]
    return HeadBias(query, leaf["scores"])


def added_by(mask, allowed):
    added = torch.zeros(allowed[:, None].shape, dtype=torch.float64)
    return added if mask is None or mask.dtype == torch.bool else torch.where(allowed[:, None], mask.double(), added)


def run_exact(leaf, allowed, mask, upstream, *, biased=True):
    """Output and gradients in float64 by a dense formula."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaf.items()}
    groups = HEADS // KEY_HEADS
    logits = exact["query"] @ exact["key"].repeat_interleave(groups, 1).mT * exact["query"].shape[-1] ** -0.5
    logits = logits + added_by(mask, allowed)
    if biased:
        bias = bias_of(exact)
        logits = logits + torch.einsum("bhqr,bkr->bhqk", bias.query.expand(len(logits), -1, -1, -1), bias.key)
    logits.retain_grad()
    some = allowed[:, None].any(-1, keepdim=True)
    weights = torch.where(some, logits.masked_fill(~allowed[:, None], -1e300).softmax(-1), 0)
    output = (weights @ exact["value"].repeat_interleave(groups, 1)).transpose(1, 2)
    output.backward(upstream.double())
    return collect(output, exact) | {"slope": logits.grad}


def run_plain(leaf, allowed, mask, upstream, *, biased):
    """The same by torch in the kernel's dtype; with the bias as a dense mask, since torch has no other place for it."""
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaf.items()}
    dtype = plain["query"].dtype
    dense = added_by(mask, allowed)
    if biased:
        bias = bias_of(plain)
        dense = dense + torch.einsum("bhqr,bkr->bhqk", bias.query.expand(len(allowed), -1, -1, -1), bias.key)
    dense = dense.masked_fill(~allowed[:, None], -torch.inf).to(dtype)
    output = F.scaled_dot_product_attention(plain["query"], plain["key"], plain["value"], dense, enable_gqa=True).transpose(1, 2)
    output.backward(upstream)
    return collect(output, plain)


def run_fused(leaf, mask, upstream, **kwargs):
    for tensor in leaf.values():
        tensor.grad = None
    bias = bias_of(leaf)
    output, weights = attend_fused(call_of(DECODER, leaf["query"], leaf["key"], leaf["value"], mask, bias, kwargs=kwargs), bias)
    assert weights is None
    assert output.is_contiguous()
    output.backward(upstream)
    return collect(output, leaf)


def cancellation(leaf, exact):
    """For what makes the bias: how much larger the gradient would be if all its terms had one sign."""
    absolute = {name: leaf[name].detach().double().abs().requires_grad_() for name in ("strength", "gate", "scores")}
    bias = bias_of(absolute)
    slope = exact.pop("slope")
    torch.einsum("bhqr,bkr->bhqk", bias.query.expand(len(slope), -1, -1, -1), bias.key).expand_as(slope).backward(slope.abs())
    return {name: float(tensor.grad.norm() / exact[name].norm()) for name, tensor in absolute.items()}


def collect(output, leaf):
    return {"output": output.detach(), **{name: tensor.grad for name, tensor in leaf.items() if tensor.grad is not None}}


def distance(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


CASES = {
    "causal": {"kind": "causal", "queries": 37, "keys": 37},
    "causal, more keys": {"kind": "causal", "head": 80, "dtype": torch.bfloat16, "queries": 33, "keys": 70, "batch": 1},
    "causal, more queries": {"kind": "causal", "queries": 70, "keys": 35, "rank": 3, "gated": True, "batch": 1},
    "left-padded, bool": {"kind": "padded bool", "dtype": torch.bfloat16, "queries": 35, "keys": 35, "rank": 3, "gated": True},
    "left-padded, float": {"kind": "padded float", "head": 128, "gated": True},
    "left-padded, float, rank 3": {"kind": "padded float", "dtype": torch.bfloat16, "queries": 34, "keys": 39, "rank": 3},
    "wide heads": {"kind": "causal", "head": 256, "queries": 34, "keys": 34, "batch": 1},
    "narrow values": {"kind": "padded bool", "head": 96, "value": 40, "batch": 1},
    "one query": {"kind": "full", "dtype": torch.bfloat16, "queries": 1, "keys": 41, "rank": 3, "gated": True},
    "one query, padded": {"kind": "padded bool", "queries": 1, "keys": 33},
    "all to all": {"kind": "full", "queries": 34, "keys": 45, "batch": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_as_exact_as_those_of_the_plain_kernel(name, interpreter):
    leaf, allowed, mask = make_case(**CASES[name])
    kind = CASES[name]["kind"]
    batch, heads, queries, _ = leaf["query"].shape
    upstream = torch.randn(batch, queries, heads, leaf["value"].shape[-1]).to(leaf["query"].dtype)
    exact = run_exact(leaf, allowed, mask, upstream)

    strength, gate, scores = (leaf[name].detach().unbind(-1) for name in ("strength", "gate", "scores"))
    gates = (column.expand(batch, queries) for column in gate)
    bias = sum(rank_one(*columns) for columns in zip(strength, gates, scores, strict=True))
    head, value = leaf["query"].shape[-1], leaf["value"].shape[-1]
    padded = F.pad(leaf["value"].detach(), (0, head - value))  # the oracle has one size for all three
    expected, _ = attend(leaf["query"].detach(), leaf["key"].detach(), padded, allowed, bias + added_by(mask, allowed), head**-0.5)
    torch.testing.assert_close(exact["output"], expected[..., :value])  # the dense formula is the oracle's

    found = run_fused(leaf, mask, upstream, is_causal=kind == "causal")
    unbiased = run_exact(leaf, allowed, mask, upstream, biased=False)
    plain = run_plain(leaf, allowed, mask, upstream, biased=False)
    carried = run_plain(leaf, allowed, mask, upstream, biased=True)
    lost = cancellation(leaf, exact)
    for part, tensor in found.items():
        if part in lost:  # sums of many terms of both signs; torch carries the bias as a mask, as we would have without the kernel
            allowed_distance = 2 * distance(carried[part], exact[part]) + torch.finfo(leaf["query"].dtype).eps * lost[part]
        else:
            allowed_distance = 2 * distance(plain[part], unbiased[part])
        assert distance(tensor, exact[part]) <= allowed_distance, part
        assert tensor.shape == exact[part].shape
        assert tensor.dtype == (leaf["query"].dtype if part == "output" else leaf[part].dtype)


def changed(name="causal", **changes):
    """A smaller case, with its bias, its upstream gradient and who may attend to whom."""
    leaf, allowed, mask = make_case(**(CASES[name] | {"batch": 1} | changes))
    upstream = torch.randn(1, leaf["query"].shape[2], HEADS, leaf["value"].shape[-1]).to(leaf["query"].dtype)
    return leaf, allowed, mask, upstream


@pytest.mark.parametrize("mask_like", [torch.bool, torch.float16, torch.float32])
def test_a_query_that_may_attend_to_nothing_gets_zero_and_gives_none(mask_like, interpreter):
    leaf, allowed, _, upstream = changed("all to all", queries=33, keys=35)
    allowed = allowed.clone()
    allowed[0, 2] = False
    mask = allowed[:, None] if mask_like == torch.bool else torch.zeros(1, 1, 33, 35, dtype=mask_like)
    if mask_like != torch.bool:
        mask = mask.masked_fill(~allowed[:, None], -torch.inf if mask_like == torch.float32 else torch.finfo(mask_like).min)
    found = run_fused(leaf, mask, upstream)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert not found["output"][:, 2].any()
    assert not found["query"][:, :, 2].any()
    assert found["output"][:, 3].all()
    others = torch.arange(33) != 2
    upstream = upstream.clone()
    upstream[:, 2] = 7  # what comes back there has nowhere to go
    again = run_fused(leaf, mask, upstream)
    assert all(torch.equal(found[part], again[part]) for part in found)
    assert found["query"][:, :, others].any(-1).all()


def test_an_unsteered_head_is_bit_equal_to_one_without_bias(interpreter):
    leaf, _, _, upstream = changed(head=16)
    steered = run_fused(leaf, None, upstream)
    with torch.no_grad():
        leaf["strength"].zero_()
    unsteered = run_fused(leaf, None, upstream)
    same = [torch.equal(steered["output"][:, :, head], unsteered["output"][:, :, head]) for head in range(HEADS)]
    assert same == [False, True, False, False]  # λ is 0 for head 1 only


def test_strides_do_not_matter(interpreter):
    leaf, allowed, _, upstream = changed("all to all", head=16)
    mask = allowed[:, None].clone()
    mask[..., 3:9] = False
    expected = run_fused(leaf, mask, upstream)
    other = {name: tensor.detach() for name, tensor in leaf.items()}
    other |= {"query": other["query"].contiguous(), "key": other["key"].mT.contiguous().mT, "value": other["value"].flip(2).flip(2)}
    assert other["key"].stride(-1) != 1
    other = {name: tensor.requires_grad_() for name, tensor in other.items()}
    wide = mask[:, :, :1].expand(1, HEADS, -1, -1)  # the same for every query
    found = run_fused(other, wide, upstream.transpose(1, 2).contiguous().transpose(1, 2))
    assert [part for part in expected if not torch.equal(found[part], expected[part])] == []


def test_only_wanted_gradients_are_computed_and_they_are_the_same(interpreter):
    leaf, _, _, upstream = changed(head=16)
    expected = run_fused(leaf, None, upstream)
    for wanted in (["strength"], ["scores"], ["query"], ["key"], ["value"]):
        for name, tensor in leaf.items():
            tensor.requires_grad_(name in wanted)
        found = run_fused(leaf, None, upstream)
        assert set(found) == {"output", *wanted}
        assert torch.equal(found[wanted[0]], expected[wanted[0]])


def test_causality_follows_the_keyword_before_the_module(interpreter):
    leaf, _, _, _ = changed(head=16)
    with torch.no_grad():
        def run(module, **kwargs):
            bias = bias_of(leaf)
            return attend_fused(call_of(module, leaf["query"], leaf["key"], leaf["value"], None, bias, kwargs=kwargs), bias)[0]

        causal, full = run(DECODER), run(DECODER, is_causal=False)
        assert not torch.equal(causal, full)
        assert torch.equal(run(SimpleNamespace(is_causal=False)), full)
        assert torch.equal(run(SimpleNamespace(), is_causal=None), causal)
        assert torch.equal(run(DECODER, scaling=0.25), causal)  # 16 ** -0.5
        assert not torch.equal(run(DECODER, scaling=0.5), causal)


def bias_like(call, query=lambda tensor: tensor, key=lambda tensor: tensor):
    return {"bias": HeadBias(query(call["bias"].query), key(call["bias"].key))}


def mask_like(*shape, dtype=torch.bool, **kwargs):
    return {"mask": torch.zeros(shape, dtype=dtype, **kwargs)}


QKV = ("query", "key", "value")


def refusal(call):
    given = (call[name] for name in (*QKV, "mask", "bias"))
    return refuse_fused(call_of(DECODER, *given, implementation="sdpa", kwargs=call["kwargs"]))


REFUSALS = {
    "dtype float64, the kernel takes float16, bfloat16, float32": lambda call: {name: call[name].double() for name in QKV},
    "query, key and value differ in dtype: float16, float16, bfloat16": lambda call: {"value": call["value"].bfloat16()},
    "head size 8, the kernel takes 16 to 256": lambda call: {name: call[name][..., :8] for name in QKV},
    "head size 272, the kernel takes 16 to 256": lambda call: {name: call[name].repeat(1, 1, 1, 17) for name in QKV},
    "value size 8, the kernel takes 16 to 256": lambda call: {"value": call["value"][..., :8]},
    "do not fit together": lambda call: {"value": call["value"][:, :, 1:]},
    "4 query heads cannot share 3 key-value heads evenly": lambda call: {n: call[n][:, :1].expand(1, 3, 35, 16) for n in QKV[1:]},
    "there are no queries or no keys": lambda call: {"query": call["query"][:, :, :0]},
    "batch times heads is 65536, the kernel takes up to 65535": lambda call: {n: call[n].expand(1 << 14, -1, -1, -1) for n in QKV},
    "rank 17, the kernel takes up to 16": lambda call: bias_like(call, *[lambda side: side.repeat_interleave(17, -1)] * 2),
    "bias (2, 4, 1, 1) by (1, 35, 1) for 1 × 4 × 33 × 35": lambda call: bias_like(call, query=lambda q: q.repeat(2, 1, 1, 1)),
    "bias (1, 4, 1, 1) by (1, 34, 1) for 1 × 4 × 33 × 35": lambda call: bias_like(call, key=lambda k: k[:, 1:]),
    "bias (1, 1, 1, 1) by (1, 35, 1) for 1 × 4 × 33 × 35": lambda call: bias_like(call, query=lambda q: q[:, :1]),
    "bias in float32 and float16, the kernel takes float32": lambda call: bias_like(call, key=lambda k: k.half()),
    "a mask of int64, the kernel takes bool, float16": lambda call: mask_like(1, 1, 33, 35, dtype=torch.int64),
    "a mask of shape (1, 1, 33, 34) for logits of shape (1, 4, 33, 35)": lambda call: mask_like(1, 1, 33, 34),
    "a mask of shape (33, 35) for logits of shape (1, 4, 33, 35)": lambda call: mask_like(33, 35),
    "the mask wants a gradient": lambda call: mask_like(1, 1, 33, 35, dtype=torch.float32, requires_grad=True),
    "dropout 0.1": lambda call: {"kwargs": {"dropout": 0.1}},
    "the kernel knows no softcap, sinks or second bias": lambda call: {"kwargs": {"softcap": 30.0}},
    "no softcap, sinks": lambda call: {"kwargs": {"s_aux": torch.zeros(4)}},
    "sinks or second bias": lambda call: {"kwargs": {"position_bias": torch.zeros(1)}},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_the_kernel_cannot_carry_is_refused_with_its_reason(reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    leaf, allowed, _, _ = changed("all to all", head=16, queries=33, keys=35)
    call = {name: tensor.detach() for name, tensor in leaf.items()} | {"mask": allowed[:, None], "kwargs": {"dropout": 0.0}}
    call["bias"] = bias_of(call)
    assert refusal(call) is None
    assert reason in refusal(call | REFUSALS[reason](call))


def test_machines_that_cannot_run_the_kernel_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    leaf, _, mask, _ = changed(head=16)
    call = leaf | {"mask": mask, "bias": bias_of(leaf), "kwargs": {}}
    assert refusal(call) == "the tensors are on cpu, the kernel runs on cuda"
    there = {name: SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=leaf[name].shape) for name in QKV}
    on_gpu = call | there  # of a tensor only these are asked
    for capability, reason in (((7, 5), "the GPU has compute capability 7.5, 8.0 is needed"), ((8, 0), None), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert refusal(on_gpu) == reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert refusal(on_gpu) == "AMD GPUs are not supported"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(on_gpu) == "triton is not installed"


KINDS = {"query": 4, "key": 4, "value": 4, "output": 4, "output_grad": 4, "query_grad": 4, "key_grad": 4, "value_grad": 4}
COLUMNS = {"bias_query": 4, "bias_key": 3, "bias_query_grad": 4, "bias_key_grad": 4}
"""Tensors of 16-bit numbers, and those of float32, with their dimensions."""


def compile_kernel(kernel, tiling, constants):
    """For a Hopper GPU that need not be there: shared memory in bytes, and PTX."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, fixed, aligned = {}, {}, [["tt.divisibility", 16]]
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], fixed[at,] = "constexpr", constants[name]
        elif name in KINDS:  # the last stride is 1
            types[name], fixed[at, 4] = ("*bf16", "i32", "i32", "i32", "constexpr"), 1
        elif name in COLUMNS:
            types[name] = ("*fp32", *["i32"] * COLUMNS[name])
        elif name == "mask":
            types[name] = ("*bf16", *["i32"] * 4)
        else:
            types[name] = {"log_sum": "*fp32", "delta": "*fp32", "scale": "fp32", "mask_floor": "fp32"}.get(name, "i32")
    hints = {(at, part): aligned for at, name in enumerate(kernel.arg_names) if name in KINDS for part in range(4)}
    options = {"num_warps": tiling[2], "num_stages": tiling[3], "enable_fp_fusion": True}
    built = compile(ASTSource(kernel, types, fixed, hints), target=GPUTarget("cuda", 90, 32), options=options)
    return built.metadata.shared, built.asm["ptx"]


def test_the_kernels_compile_for_a_gpu_and_fit_its_shared_memory(tmp_path, monkeypatch):
    """The interpreter takes much that the compiler does not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in (KERNELS, LAUNCH):
        monkeypatch.delitem(sys.modules, name, raising=False)
    kernels, launch = (importlib.import_module(name) for name in (KERNELS, LAUNCH))
    constants = dict.fromkeys(("HEAD", "HEAD_WIDTH", "VALUE", "VALUE_WIDTH"), 64) | {"RANK": 2, "RANKS": 2, "CAUSAL": True}
    constants |= dict.fromkeys(("NEEDS_QUERY", "NEEDS_KEY", "NEEDS_VALUE", "NEEDS_BIAS"), True) | {"MASK": kernels.FLOAT_MASK.value}
    all_three = (kernels.forward_kernel, kernels.query_gradient_kernel, kernels.key_gradient_kernel)
    for kernel, tiling in zip(all_three, launch.TILINGS[64, True], strict=True):
        chosen = {name: size for name, size in constants.items() if name in kernel.arg_names}
        shared, ptx = compile_kernel(kernel, tiling, chosen | {"BLOCK_M": tiling[0], "BLOCK_N": tiling[1]})
        assert 0 < shared <= 163 * 1024
        assert "wgmma" in ptx  # Hopper's tensor cores


@pytest.mark.parametrize("padding", ["left", None])
def test_a_model_is_steered_through_the_kernel_as_through_the_channels(interpreter, padding):
    inputs = prompt_for("qwen2", rows=[[21], [13 if padding else 21]])
    if padding is None:
        del inputs["attention_mask"]
    found = {}
    for backend in ("folded", "triton"):
        model = patch_model(make_model("qwen2", head_dim=16), steer("qwen2", backend=backend, preserve_mass=True))
        found[backend] = logits(model, inputs, gaze("qwen2", inputs))
        unpatch_model(model)
        found["plain"] = logits(model, inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(found["triton"][real], found["folded"][real], **TOLERANCE)
    assert (found["plain"] - found["triton"])[real].abs().max() > 0.1
    assert LAUNCH in sys.modules


def test_importing_hf_steer_loads_no_kernels():
    """Nor would it load Triton or FlexAttention, if torch and transformers did not."""
    script = "import sys, hf_steer.attention; print([name for name in sys.modules if 'fused_' in name and 'hf_steer' in name])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
