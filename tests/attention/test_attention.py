"""Every backend against the fp64 oracle in plain loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.calls import attend_with, call_of
from kit.oracle import attend, rank_one
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_steer.attention import BACKENDS, SteeredCall, attend_for, backends, choose_backend, fit_bias, head_bias, mass_shift
from hf_steer.attention.backends import PREFERRED
from hf_steer.attention.bias import on_device
from hf_steer.attention.masked import merge_mask
from hf_steer.errors import SteerError
from hf_steer.ground.attention_call import steered_function
from hf_steer.values import HeadBias, TokenScores

INNER = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}
pytestmark = pytest.mark.usefixtures("flex_without_a_compiler")
WRAPPING = [(name, implementation) for name in ("folded", "mask", "flex") for implementation in INNER]
wrapping = pytest.mark.parametrize(("backend", "implementation"), WRAPPING)
BATCH, HEADS, GROUPED, KEYS, HEAD_DIM = 2, 4, 2, 11, 12
SCALING = 0.31


class Module(torch.nn.Module):
    num_key_value_groups, layer_idx, is_causal = HEADS // GROUPED, 0, True


def make_case(queries, dtype=torch.float32, *, gated=True):
    generator = torch.Generator().manual_seed(3)
    def draw(*shape):
        return torch.randn(shape, generator=generator)
    query, key, value = draw(BATCH, HEADS, queries, HEAD_DIM), *(draw(BATCH, GROUPED, KEYS, HEAD_DIM) for _ in range(2))
    strength, scores = torch.tensor([1.5, 0.0, -2.0, 0.37]), draw(BATCH, KEYS) * 1.3
    gate = torch.rand(BATCH, queries, generator=generator) if gated else torch.ones(BATCH, queries)
    allowed = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries).expand(BATCH, -1, -1).clone()
    allowed[1, :, :3] = False  # left padding
    allowed[1, torch.arange(queries), torch.arange(queries) + KEYS - queries] = True  # a query sees itself
    return query.to(dtype), key.to(dtype), value.to(dtype), strength, scores, gate, allowed


def run(backend, implementation, case, *, gated=True, mask_kind=None):
    query, key, value, strength, scores, gate, allowed = case
    groups = TokenScores(scores, torch.zeros_like(scores).long())
    bias = head_bias(groups, strength, None, gate if gated else None)
    mask = allowed[:, None]
    if (mask_kind or implementation) != "sdpa":
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return attend_with(backend, INNER[implementation], Module(), query, key, value, mask, bias, scaling=SCALING, dropout=0.0
    )


@pytest.mark.parametrize("queries", [1, 7, KEYS])
@wrapping
def test_backends_agree_with_the_oracle(backend, implementation, queries):
    case = make_case(queries)
    query, key, value, strength, scores, gate, allowed = case
    expected, weights = attend(query, key, value, allowed, rank_one(strength, gate, scores), SCALING)
    output, own_weights = run(backend, implementation, case)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    if own_weights is not None:
        torch.testing.assert_close(own_weights.double(), weights, rtol=1e-4, atol=1e-5)
    unbiased, _ = attend(query, key, value, allowed, torch.zeros(BATCH, HEADS, queries, KEYS), SCALING)
    assert (expected - unbiased)[:, :, 0].abs().max() > 0.1
    torch.testing.assert_close(output[:, :, 1].double(), unbiased[:, :, 1], rtol=1e-4, atol=1e-5)  # strength 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["folded", "mask", "cpu_flash", "flex"])
def test_a_causal_prompt_without_a_mask_stays_causal(backend, gated):
    if gated and backend == "cpu_flash":
        return  # refused: see test_what_a_backend_cannot_carry_another_does
    query, key, value, strength, scores, gate, _ = make_case(KEYS, gated=gated)
    allowed = torch.ones(KEYS, KEYS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), SCALING)
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, gate if gated else None)
    output, _ = attend_with(backend, INNER["sdpa"], Module(), query, key, value, None, bias, scaling=SCALING)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    default, _ = attend_with(backend, INNER["sdpa"], Module(), query, key, value, None, bias)
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), HEAD_DIM**-0.5)
    torch.testing.assert_close(default.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", INNER)
def test_split_columns_keep_the_bias_more_exact_than_a_mask_of_the_same_dtype(dtype, implementation):
    """Same kernel, same q, k, v: only the way in which the bias is carried differs."""
    errors = {}
    for backend in ("folded", "mask"):
        case = make_case(7, dtype)
        query, key, value, strength, scores, gate, allowed = case
        expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), SCALING)
        output, _ = run(backend, implementation, case)
        errors[backend] = (output.double() - expected).pow(2).mean().sqrt()
        unbiased, _ = attend(query, key, value, allowed, torch.zeros(BATCH, HEADS, 7, KEYS), SCALING)
        plain, _ = INNER["sdpa"](Module(), query, key, value, allowed[:, None], scaling=SCALING)
        floor = (plain.double() - unbiased).pow(2).mean().sqrt()
        assert errors[backend] < 3 * floor
    assert errors["folded"] <= 1.2 * errors["mask"]


def dense_attention(query, key, value, strength, scores, allowed):
    """The formula, in the dtype of its arguments."""
    key, value = (own.repeat_interleave(HEADS // GROUPED, 1) for own in (key, value))
    logits = query @ key.transpose(2, 3) * SCALING + strength[:, None, None] * scores[:, None, None]
    return (torch.softmax(logits.masked_fill(~allowed[:, None], float("-inf")), -1) @ value).transpose(1, 2)


def gradients(attend, case, dtype):
    """Output and gradients of a fixed mixture of it, float64: query, key, value, strength, scores."""
    query, key, value, strength, scores, _, _ = case
    leaves = [own.detach().clone().to(dtype).requires_grad_() for own in (query, key, value)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # the bias stays float32 in 16-bit models
    leaves += [own.detach().clone().to(wide).requires_grad_() for own in (strength, scores)]
    output = attend(*leaves)
    mixture = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output.double() * mixture).sum().backward()
    return [output.detach().double(), *(leaf.grad.double() if leaf.grad is not None else None for leaf in leaves)]


def relative(own, exact):
    return float((own - exact).norm() / exact.norm())


EXACT = [
    (backend, implementation, padded, dtype)
    for backend, implementation in (*((way, under) for way in ("folded", "mask") for under in INNER), ("cpu_flash", "sdpa"))
    for padded in (False, True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    # these two are refused: see test_what_a_backend_cannot_carry_another_does
    if not (backend == "cpu_flash" and padded) and (backend, implementation, dtype) != ("folded", "eager", torch.float16)
]


@pytest.mark.parametrize(("backend", "implementation", "padded", "dtype"), EXACT)
def test_values_and_gradients_are_as_exact_as_those_of_the_plain_kernel(backend, implementation, padded, dtype):
    case = make_case(KEYS, dtype)
    allowed = case[-1] if padded else torch.ones(KEYS, KEYS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    mask = allowed[:, None]
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    elif not padded:
        mask = None

    def plain(query, key, value, strength, scores):
        return INNER[implementation](Module(), query, key, value, mask, scaling=SCALING, dropout=0.0)[0]

    def steered(query, key, value, strength, scores):
        if backend == "cpu_flash":
            strength, scores = strength.detach(), scores.detach()
        bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
        asked = call_of(Module(), query, key, value, mask, bias, implementation=implementation, kwargs={})
        assert backends.refuse(backend, asked) is None
        return attend_with(backend, INNER[implementation], Module(), query, key, value, mask, bias, scaling=SCALING)[0]

    def formula(query, key, value, strength, scores):
        return dense_attention(query, key, value, strength, scores, allowed)

    def unsteered_formula(query, key, value, strength, scores):
        return dense_attention(query, key, value, strength * 0, scores, allowed)

    floor = max(
        relative(own, exact)
        for own, exact in zip(gradients(plain, case, dtype), gradients(unsteered_formula, case, torch.float64), strict=True)
        if own is not None
    )
    found, exact = gradients(steered, case, dtype), gradients(formula, case, torch.float64)
    names = ["output", "query", "key", "value", "strength", "scores"]
    assert [name for name, own in zip(names, found, strict=True) if own is None] == (names[4:] if backend == "cpu_flash" else [])
    errors = {name: relative(own, true) for name, own, true in zip(names, found, exact, strict=True) if own is not None}
    # eager gets a 16-bit mask, which rounds the bias; sdpa on a CPU takes a wider one, and folded channels do not round
    budget = (6 if (backend, implementation, dtype) == ("mask", "eager", torch.bfloat16) else 3) * floor
    assert max(errors.values()) < budget, (errors, floor)


def test_split_columns_are_float32_exact_to_sixteen_bits():
    from hf_steer.attention.folded import split_key, split_query

    query, key = torch.randn(1, 4, 1, 1) * 3, torch.randn(2, 50, 1)
    exact = query[..., 0].double() * key[..., 0].double()[:, None]
    for dtype, bits in ((torch.bfloat16, 15), (torch.float16, 17)):
        q, k = split_query(query, dtype), split_key(key, dtype)
        product = torch.einsum("bhr,bkr->bhk", q[:, :, 0].double().expand(2, -1, -1), k.double())
        assert ((product - exact).abs() / exact.abs()).max() < 2.0**-bits


@pytest.mark.parametrize("backend", ["folded", "mask"])
def test_preserved_mass_is_exact_where_attention_inside_a_group_is_uniform(backend):
    _, key, value, _, scores, _, _ = make_case(3)
    query = torch.zeros(BATCH, HEADS, 3, HEAD_DIM)  # uniform attention
    group = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1], [-1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1]])
    scores = torch.where(group >= 0, scores, 0.0)
    strength = torch.tensor([1.5, 0.0, -2.0, 4.0])
    mass = {}
    for preserve in (False, True):
        grouped = TokenScores(scores, group)
        bias = head_bias(grouped, strength, mass_shift(grouped, strength) if preserve else None, None)
        everyone = torch.zeros(BATCH, 1, 3, KEYS)
        _, weights = attend_with(backend, INNER["eager"], Module(), query, key, value, everyone, bias, scaling=SCALING)
        mass[preserve] = torch.stack([(weights * (group == g)[:, None, None]).sum(-1) for g in (0, 1)])
    uniform = torch.stack([(group == g).float().mean(1) for g in (0, 1)])[:, :, None, None].expand(-1, -1, HEADS, 3)
    torch.testing.assert_close(mass[True], uniform)
    assert (mass[False] - uniform).abs().max() > 0.1
    assert weights[0, 0, 0, 1:4].std() > 0.01  # it moves attention within the picture


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
@pytest.mark.parametrize("queries", [1, 3], ids=["one bias for all queries", "one each"])
def test_merging_never_opens_a_masked_position_and_never_closes_an_open_one(kind, queries):
    bias = torch.full((1, 2, queries, 3), 1e4)
    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    masks = {"bool": allowed, "float": torch.zeros(3, 3).masked_fill(~allowed, torch.finfo(torch.float32).min), "none": None}
    merged = merge_mask(bias, masks[kind], causal_queries=3)
    weights = torch.softmax(merged, -1)
    assert weights.shape[2] == 3
    assert weights[..., ~allowed].max() == 0
    assert weights[..., allowed].min() > 0
    assert torch.isfinite(merged).all()


def call(implementation="sdpa", *, queries=KEYS, keys=None, dtype=torch.float32, heads=HEADS, value_dim=None, **more):
    """A call of unmasked attention with one bias per head, and what it is told besides."""
    keys, head_dim, gated = keys or queries, more.pop("head_dim", 64), more.pop("gated", False)
    query, key = torch.zeros(1, heads, queries, head_dim, dtype=dtype), torch.zeros(1, heads, keys, head_dim, dtype=dtype)
    value = torch.zeros(1, heads, keys, value_dim or head_dim, dtype=dtype)
    bias = HeadBias(torch.ones(1, heads, queries if gated else 1, 1), torch.ones(1, keys, 1))
    mask = more.pop("mask", None)
    return call_of(Module(), query, key, value, mask, bias, implementation=implementation, kwargs=more)


@pytest.mark.parametrize(
    ("expected", "situation"),
    [
        ("cpu_flash", {}),
        ("mask", {"queries": 1, "keys": 9}),
        ("folded", {"gated": True}),
        ("folded", {"mask": torch.ones(1, 1, KEYS, KEYS, dtype=torch.bool)}),
        ("folded", {"value_dim": 48}),
        ("folded", {"dropout": 0.1}),
        ("folded", {"is_causal": False}),
        ("folded", {"position_bias": torch.zeros(1)}),
        ("folded", {"implementation": "eager"}),
        ("mask", {"implementation": "eager", "dtype": torch.float16}),
        ("mask", {"implementation": "eager", "softcap": 30.0}),
        ("folded", {"implementation": "eager", "s_aux": torch.zeros(HEADS)}),
        ("flex", {"implementation": "flex_attention"}),
        ("folded", {"implementation": "flash_attention_2"}),
        ("folded", {"implementation": "flash_attention_3", "queries": 1, "keys": 9}),
        ("folded", {"implementation": "flash_attention_2", "s_aux": torch.zeros(HEADS), "sliding_window": 4}),
    ],
)
def test_auto_takes_the_cheapest_backend_that_is_exact(expected, situation):
    assert choose_backend("auto", call(**situation)) == expected


@pytest.mark.parametrize(
    ("wanted", "situation", "taken", "reason"),
    [
        ("cpu_flash", {"gated": True}, "folded", "the bias differs from query to query"),
        ("cpu_flash", {"queries": 1, "mask": torch.ones(1, 1, 1, 1) > 0}, "mask", "it needs a causal prompt without padding"),
        ("cpu_flash", {"queries": 1, "keys": 9}, "mask", "it needs a causal prompt without padding"),
        ("cpu_flash", {"value_dim": 48}, "folded", "heads of 64 and values of 48 differ"),
        ("cpu_flash", {"dropout": 0.1}, "folded", "knows no softcap, sinks, dropout or second bias"),
        ("cpu_flash", {"implementation": "eager"}, "folded", "it does not know the masks of 'eager'"),
        ("folded", {"implementation": "eager", "softcap": 30.0}, "mask", "softcapped logits would bend a folded bias"),
        ("folded", {"implementation": "eager", "dtype": torch.float16}, "mask", "float16 ends at 65504"),
        ("mask", {"implementation": "flash_attention_2"}, "folded", "it does not know the masks of 'flash_attention_2'"),
        ("mask", {"implementation": "flex_attention"}, "flex", "it does not know the masks of 'flex_attention'"),
        ("flex", {"dropout": 0.1}, "folded", "FlexAttention has no dropout"),
        ("flex", {"queries": 1, "keys": 9}, "mask", "FlexAttention for a single query on CPUs"),
        ("flex", {"s_aux": torch.zeros(HEADS)}, "folded", "FlexAttention has no sinks on CPUs"),
        ("flex", {"implementation": "eager"}, "folded", "it does not know the masks of 'eager'"),  # and gives no weights
        ("triton", {}, "cpu_flash", "the tensors are on cpu, the kernel runs on cuda"),
    ],
)
def test_what_a_backend_cannot_carry_another_does_and_that_is_said_once(wanted, situation, taken, reason):
    backends.say_once.cache_clear()
    with pytest.warns(UserWarning, match=f"backend '{wanted}' gives way to '{taken}', with the same result: .*{reason}"):
        assert choose_backend(wanted, call(**situation)) == taken
    assert choose_backend(wanted, call(**situation)) == taken  # a second warning would be an error


def test_a_backend_that_needs_gradients_gives_way_where_there_are_none():
    backends.say_once.cache_clear()
    asked = call()
    with pytest.warns(match="'flex' gives way to 'cpu_flash'.*no backward pass on CPUs"):
        assert choose_backend("flex", dataclasses.replace(asked, query=asked.query.requires_grad_())) == "cpu_flash"


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        ({"implementation": "flash_attention_2", "softcap": 30.0}, "'folded': softcapped logits would bend a folded bias"),
        ({"implementation": "flash_attention_2", "head_dim": 256}, "heads of 256 leave no room for its channels below 256"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "folded"])
def test_where_no_backend_is_exact_the_call_is_refused(wanted, situation, reason):
    with pytest.raises(SteerError, match=f"no backend can carry the bias.*{reason}" if wanted == "auto" else "no backend can"):
        choose_backend(wanted, call(**situation))


@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (1, HEADS), (BATCH, HEADS)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("backend", ["folded", "mask", "flex"])
def test_masks_of_every_shape_are_heeded(backend, kind, shape):
    """A mask may be one for all rows or heads, or differ from head to head."""
    query, key, value, strength, scores, gate, _ = make_case(KEYS, gated=False)
    allowed = torch.rand(*shape, KEYS, KEYS, generator=torch.Generator().manual_seed(5)) > 0.4
    allowed = allowed | torch.eye(KEYS, dtype=torch.bool)
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
    logits = query.double() @ key.repeat_interleave(2, 1).double().mT * SCALING + rank_one(strength, gate[:, :1], scores)
    expected = (logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1).double()).transpose(1, 2)
    output, _ = attend_with(backend, INNER["sdpa"], Module(), query, key, value, mask, bias, scaling=SCALING)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (127, 127), (128, 128), (129, 129), (300, 300), (140, 500), (300, 200)])
def test_the_blocks_that_flex_attention_skips_are_those_of_the_causal_triangle(queries, keys):
    from torch.nn.attention.flex_attention import create_block_mask

    from hf_steer.attention.flex import causal_blocks

    blocks = causal_blocks(queries, keys, torch.device("cpu"))
    expected = create_block_mask(lambda b, h, q, k: q >= k, None, None, queries, keys, device="cpu")
    seen, due = (own.to_dense() > 0 for own in (blocks, expected))
    assert torch.equal(seen, due)  # partly or wholly
    assert blocks.shape == expected.shape
    whole = []
    for own in (blocks, expected):
        counts, numbers = own.full_kv_num_blocks[0, 0].tolist(), own.full_kv_indices[0, 0].tolist()
        whole.append({(row, column) for row, count in enumerate(counts) for column in numbers[row][:count]})
    assert whole[0] == whole[1]


def test_raw_scores_beyond_the_range_of_float16_fold_if_the_bias_is_within_it():
    query, key, value, _, scores, gate, allowed = make_case(KEYS, torch.float16, gated=False)
    strength, scores = torch.tensor([2e-5, 0.0, -1e-5, 5e-6]), scores * 60000
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), SCALING)
    output, _ = run("folded", "sdpa", (query, key, value, strength, scores, gate, allowed), gated=False)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2**-8)


def many_keys(queries, keys=600, spread=12.0):
    """A bias that decides which of many keys wins: rounding it shows."""
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(1, HEADS, count, 32, generator=generator) for count in (queries, keys, keys))
    scores, strength = torch.randn(1, keys, generator=generator), torch.tensor([1.0, -0.7, 0.3, 1.2]) * spread
    tensors = [own.bfloat16() for own in (query, key, value)]
    logits = tensors[0].double() @ tensors[1].double().mT * SCALING
    biases = torch.zeros(HEADS, 1, keys), strength[:, None, None] * scores
    exact = [((logits + bias).softmax(-1) @ tensors[2].double()).transpose(1, 2) for bias in biases]
    return tensors, head_bias(TokenScores(scores, torch.zeros(1, keys).long()), strength, None, None), exact


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize(
    ("backend", "implementation"), [("folded", "sdpa"), ("folded", "eager"), ("mask", "sdpa"), ("mask", "eager")]
)
def test_a_large_bias_is_not_rounded_in_sixteen_bits(backend, implementation, queries, how):
    if backend == "mask" and (how == "autocast" if implementation == "sdpa" else queries > 1):
        return  # autocast rounds sdpa's mask; eager's has the logits' type, or it would hold queries × keys twice as wide
    tensors, bias, (unbiased, expected) = many_keys(queries)
    tensors = [own.float() for own in tensors] if how == "autocast" else tensors
    site = Module()
    site.num_key_value_groups, site.is_causal = 1, False
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        plain, _ = INNER[implementation](site, *tensors, None, scaling=SCALING)
        output, _ = attend_with(backend, INNER[implementation], site, *tensors, None, bias, scaling=SCALING)
    assert plain.dtype == output.dtype == torch.bfloat16
    assert relative(output.double(), expected) < 3 * relative(plain.double(), unbiased)


@pytest.mark.parametrize("backend", ["folded", "mask", "flex"])
def test_every_rank_is_added(backend):
    query, key, value, _, _, _, allowed = make_case(KEYS)
    bias = HeadBias(torch.randn(BATCH, HEADS, KEYS, 3), torch.randn(BATCH, KEYS, 3))
    expected, _ = attend(query, key, value, allowed, torch.einsum("bhqr,bkr->bhqk", bias.query, bias.key), SCALING)
    output, _ = attend_with(backend, INNER["sdpa"], Module(), query, key, value, allowed[:, None], bias, scaling=SCALING)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def never(module, options):
    raise AssertionError("the keyword is there")


def test_what_was_decided_for_one_layer_does_not_hold_for_a_layer_with_another_mask():
    """Sliding layers may have a mask where full ones have none: the CPU's flash kernel would drop it."""
    query, key, value, strength, scores, _, allowed = make_case(KEYS)
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
    outputs = []
    for masks in ((None, allowed[:, None], None), (allowed[:, None],), (None,)):
        passing = SteeredCall(biases={0: bias})
        outputs.append([
            steered_function(attend_for, fit_bias, never, inner=INNER["sdpa"], implementation="sdpa")(
                Module(), query, key, value, mask, hf_steer=passing
            )[0]
            for mask in masks
        ])
    torch.testing.assert_close(outputs[0], [outputs[2][0], outputs[1][0], outputs[2][0]], rtol=0, atol=0)
    assert (outputs[1][0] - outputs[2][0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["grouped", "other value size", "position_bias", "dropout"])
def test_a_single_query_through_sdpa(case, dtype):
    query, key, value, strength, scores, gate, allowed = make_case(1, dtype, gated=False)
    extra = torch.linspace(-1, 1, KEYS).expand(BATCH, HEADS, 1, KEYS)
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores) + extra * (case == "position_bias"), SCALING)
    if case == "other value size":
        value, expected = value[..., :8], expected[..., :8]
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
    more = {"position_bias": extra.to(dtype)} if case == "position_bias" else {}
    if case == "dropout":
        more = {"dropout": 1e-9}  # takes the kernel that has dropout, and drops nothing
    output, _ = attend_with("mask", INNER["sdpa"], Module(), query, key, value, allowed[:, None], bias, scaling=SCALING, **more)
    assert output.shape == (BATCH, 1, HEADS, value.shape[-1])
    # what the output and, where the kernel takes no wider one, the mask lose to 16 bits
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(output.double(), expected, **tolerance)


def test_softcaps_that_sdpa_refuses_are_refused_with_a_bias_too():
    query, key, value, strength, scores, _, allowed = make_case(1)
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, None)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        attend_with("mask", INNER["sdpa"], Module(), query, key, value, allowed[:, None], bias, softcap=30.0)


def test_layers_on_other_devices_get_the_bias_there_and_each_device_gets_it_once():
    """`device_map` spreads layers over devices; meta stands for another one."""
    bias = HeadBias(torch.ones(1, HEADS, 1, 1), torch.ones(1, KEYS, 1))
    passing = SteeredCall(biases={0: bias})
    seen = []

    def inner(module, query, key, value, mask, **kwargs):
        seen.append((query.device.type, key.device.type, mask.device.type))
        return query.transpose(1, 2), None

    for device in ("meta", "cpu", "meta"):
        tensors = [torch.zeros(1, HEADS, count, 8, device=device) for count in (1, KEYS, KEYS)]
        steered = steered_function(attend_for, fit_bias, never, inner=inner, implementation="sdpa")
        steered(Module(), *tensors, None, hf_steer=passing)
    assert seen == [(device,) * 3 for device in ("meta", "cpu", "meta")]
    moved = on_device(bias, torch.device("meta"))
    assert on_device(bias, torch.device("meta")) is moved
    assert on_device(bias, torch.device("cpu")) is bias


def test_a_paged_cache_is_refused_by_every_backend():
    for wanted in ("auto", *BACKENDS):
        with pytest.raises(SteerError, match="the keys are in a paged cache.*without continuous batching"):
            choose_backend(wanted, call(cache=object()))


def test_what_is_preferred_is_in_the_table():
    for names in PREFERRED.values():
        assert {name for phase in names for name in phase} <= set(BACKENDS)


def test_memory_of_the_folded_channel_does_not_grow_with_queries_times_keys():
    """The tensors that the backend makes itself: columns, never a queries × keys bias."""
    sizes = []
    def inner(module, query, key, value, mask, **kwargs):
        sizes.append((query.shape, key.shape, value.shape, mask))
        return torch.zeros(1, query.shape[2], HEADS, query.shape[-1]), None
    for length in (64, 128):
        scores = TokenScores(torch.randn(1, length), torch.zeros(1, length).long())
        bias = head_bias(scores, torch.ones(HEADS), None, None)
        tensors = torch.zeros(1, HEADS, length, 16), torch.zeros(1, GROUPED, length, 16), torch.zeros(1, GROUPED, length, 16)
        attend_with("folded", inner, Module(), *tensors, None, bias, scaling=1.0)
        assert bias.query.numel() + bias.key.numel() == HEADS + length
    assert [size[0][-1] for size in sizes] == [24, 24]
    assert all(size[3] is None for size in sizes)
