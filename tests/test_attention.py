"""Every backend against the fp64 oracle in plain loops."""

from __future__ import annotations

import pytest
import torch
from oracle import attend, rank_one
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_steer.attention import BACKENDS, choose_backend, head_bias, mass_shift
from hf_steer.attention.masked import merge_mask
from hf_steer.errors import SteerError
from hf_steer.values import HeadBias, TokenScores

INNER = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}
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
    return BACKENDS[backend].attend(
        INNER[implementation], Module(), query, key, value, mask, bias, scaling=SCALING, dropout=0.0
    )


@pytest.mark.parametrize("queries", [1, 7, KEYS])
@pytest.mark.parametrize("implementation", INNER)
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_causal_prompt_without_a_mask_stays_causal(backend):
    query, key, value, strength, scores, gate, _ = make_case(KEYS)
    allowed = torch.ones(KEYS, KEYS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), SCALING)
    bias = head_bias(TokenScores(scores, torch.zeros_like(scores).long()), strength, None, gate)
    output, _ = BACKENDS[backend].attend(INNER["sdpa"], Module(), query, key, value, None, bias, scaling=SCALING)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    default, _ = BACKENDS[backend].attend(INNER["sdpa"], Module(), query, key, value, None, bias)
    expected, _ = attend(query, key, value, allowed, rank_one(strength, gate, scores), HEAD_DIM**-0.5)
    torch.testing.assert_close(default.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", INNER)
def test_split_columns_keep_the_bias_more_exact_than_a_mask_of_the_same_dtype(dtype, implementation):
    """Same kernel, same q, k, v: only the way in which the bias is carried differs."""
    errors = {}
    for backend in BACKENDS:
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


def test_split_columns_are_float32_exact_to_sixteen_bits():
    from hf_steer.attention.folded import split_columns

    query, key = torch.randn(1, 4, 1, 1) * 3, torch.randn(2, 50, 1)
    exact = query[..., 0].double() * key[..., 0].double()[:, None]
    for dtype, bits in ((torch.bfloat16, 15), (torch.float16, 17)):
        q, k = split_columns(query, key, dtype)
        product = torch.einsum("bhr,bkr->bhk", q[:, :, 0].double().expand(2, -1, -1), k.double())
        assert ((product - exact).abs() / exact.abs()).max() < 2.0**-bits


@pytest.mark.parametrize("backend", BACKENDS)
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
        _, weights = BACKENDS[backend].attend(INNER["eager"], Module(), query, key, value, everyone, bias, scaling=SCALING)
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


def test_float16_falls_back_to_the_mask_where_the_product_would_overflow():
    query = torch.zeros(1, HEADS, 5, 128, dtype=torch.float16)
    def bias(strength):
        return HeadBias(torch.full((1, HEADS, 1, 1), float(strength)), torch.full((1, 9, 1), 3.0))
    assert choose_backend("auto", query, bias(8), None) == "folded"
    assert choose_backend("auto", query, bias(1e4), None) == "mask"
    assert choose_backend("auto", query.bfloat16(), bias(1e4), None) == "folded"
    assert choose_backend("auto", query[:, :, :1], bias(1), None) == "mask"
    with pytest.raises(SteerError, match="would overflow float16: .* reaches 339411.*backend='auto'"):
        choose_backend("folded", query, bias(1e4), None)


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
        BACKENDS["folded"].attend(inner, Module(), *tensors, None, bias, scaling=1.0)
        assert bias.query.numel() + bias.key.numel() == HEADS + length
    assert [size[0][-1] for size in sizes] == [24, 24]
    assert all(size[3] is None for size in sizes)
