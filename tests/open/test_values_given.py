"""A statement is a value: what it was given may change afterwards; and numbers are numbers, whoever made them."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from kit.asking import logits, prompt, steered

from hf_steer import (
    AlignerConfig,
    AttentionConfig,
    ConfigError,
    GateConfig,
    Saliency,
    SaliencyConfig,
    SteerConfig,
    use_strength,
)

SIZE = (30, 20)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def seeing():
    return steered("qwen2_vl"), prompt("qwen2_vl")


@pytest.mark.parametrize("make", [Saliency.from_map, Saliency.from_mask])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool])
def test_four_maps_made_in_one_buffer_are_four_maps(seeing, make, dtype):
    model, inputs = seeing
    buffer, made, fresh = np.zeros((4, 6), dtype), [], []
    for number in range(4):
        buffer[:] = 0
        buffer[number, number] = 1
        made.append(make(buffer))
        fresh.append(make(buffer.copy()))
    found = [logits(model, inputs, one) for one in made]
    assert all(torch.equal(one, logits(model, inputs, other)) for one, other in zip(found, fresh, strict=True))
    assert not torch.equal(found[0], found[3])


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.numpy(), lambda x: x.tolist()], ids=["torch", "numpy", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_token_scores_are_copied(kind, dtype):
    model, inputs = steered("qwen2"), prompt("qwen2")
    given = kind(torch.arange(9)[None].to(dtype))
    statement = Saliency.from_tokens(given)
    expected = logits(model, inputs, statement)
    given[0][:] = [0] * 9 if isinstance(given, list) else 0
    assert torch.equal(logits(model, inputs, statement), expected)


def test_an_inference_tensor_and_one_with_a_graph_are_copied():
    model, inputs = steered("qwen2"), prompt("qwen2")
    scores = torch.randn(1, 9)
    expected = logits(model, inputs, Saliency.from_tokens(scores))
    grown = scores.clone().requires_grad_(True)
    statement = Saliency.from_tokens(grown)
    with torch.no_grad():
        grown.zero_()
    assert torch.equal(logits(model, inputs, statement), expected)
    assert not statement.tokens.requires_grad


@pytest.mark.parametrize(("make", "given", "size"), [
    (Saliency.from_boxes, [[0, 0, 10, 10], [20, 10, 30, 20]], [30, 20]),
    (Saliency.from_points, [[3.0, 4.0], [25.0, 15.0]], [30, 20]),
])  # fmt: skip
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_boxes_and_points_are_copied(seeing, make, given, size, kind):
    model, inputs = seeing
    mine, my_size = kind(copy.deepcopy(given)), kind(list(size))
    statement = make(mine, my_size)
    expected = logits(model, inputs, make(given, tuple(size)))
    mine[0][:] = [5, 5, 6, 6][: len(given[0])] if kind is list else kind([5, 5, 6, 6][: len(given[0])])
    my_size[0] = 3000
    assert torch.equal(logits(model, inputs, statement), expected)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_boxes_may_be_tensors_of_any_dtype_and_device(seeing, dtype, device):
    model, inputs = seeing
    expected = logits(model, inputs, Saliency.from_boxes((0, 0, 10, 10), SIZE))
    one = torch.tensor([0, 0, 10, 10], dtype=dtype, device=device)
    for given in (one, one[None], [one], tuple(one), one.cpu().requires_grad_(True) if dtype.is_floating_point else one):
        for size in (SIZE, torch.tensor(SIZE, device=device), torch.tensor(SIZE, device=device).to(torch.float32)):
            assert torch.equal(logits(model, inputs, Saliency.from_boxes(given, size)), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8])
def test_boxes_may_be_arrays_of_any_dtype(seeing, dtype):
    model, inputs = seeing
    expected = logits(model, inputs, Saliency.from_boxes((0, 0, 10, 10), SIZE))
    one = np.array([0, 0, 10, 10], dtype)
    for given in (one, one[None], [one], tuple(one)):
        assert torch.equal(logits(model, inputs, Saliency.from_boxes(given, np.array(SIZE))), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_token_scores_may_have_any_dtype(dtype):
    model, inputs = steered("qwen2"), prompt("qwen2")
    scores = (torch.arange(9)[None] % 3).to(dtype)
    expected = logits(model, inputs, Saliency.from_tokens(scores.float()))
    assert torch.equal(logits(model, inputs, Saliency.from_tokens(scores)), expected)


@pytest.mark.parametrize("weight", [np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
def test_weights_of_statements_may_be_scalars_of_numpy_and_torch(seeing, weight):
    model, inputs = seeing
    box = Saliency.from_boxes((0, 0, 10, 10), SIZE)
    assert torch.equal(logits(model, inputs, box * weight), logits(model, inputs, box * 2.0))


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
def test_strengths_may_be_scalars_of_numpy_and_torch(number):
    plain = AttentionConfig(strength=2.0)
    assert AttentionConfig(strength=number) == plain
    assert type(AttentionConfig(strength=number).strength) is float
    by_head = AttentionConfig(heads={1: (0,)}, strength={1: {0: number}})
    assert by_head == AttentionConfig(heads={1: (0,)}, strength={1: {0: 2.0}})


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, torch.tensor])
def test_heads_and_layers_may_be_scalars_of_numpy_and_torch(integer):
    plain = AttentionConfig(heads={1: (0, 3)}, saliency=SaliencyConfig(source=None))
    made = AttentionConfig(heads={integer(1): (integer(0), integer(3))}, saliency=SaliencyConfig(source=None))
    assert made == plain
    assert [type(layer) for layer in made.heads] == [int]
    assert all(type(head) is int for heads in made.heads.values() for head in heads)
    assert AttentionConfig(heads={integer(1): np.array([0, 3])}, saliency=SaliencyConfig(source=None)) == plain


def test_every_number_of_a_configuration_may_be_a_scalar():
    made = SteerConfig(
        attention=AttentionConfig(
            strength={np.int64(1): np.float32(0.5)}, heads={np.int64(1): "all"}, schedule={"prompt": np.float32(0.5)},
            saliency=SaliencyConfig(clip=np.float32(2.5), blocks=(np.int64(-1),)), gate=GateConfig(kind="entropy"),
        ),
        aligners=(AlignerConfig(modality="image", num_experts=np.int64(4), temperature=np.float32(0.5), top_k=torch.tensor(2)),),
    )  # fmt: skip
    plain = SteerConfig(
        attention=AttentionConfig(
            strength={1: 0.5}, heads={1: "all"}, schedule={"prompt": 0.5}, saliency=SaliencyConfig(clip=2.5, blocks=(-1,)),
            gate=GateConfig(kind="entropy"),
        ),
        aligners=(AlignerConfig(modality="image", num_experts=4, temperature=0.5, top_k=2),),
    )  # fmt: skip
    assert made == plain
    assert json.dumps(made.to_dict()) == json.dumps(plain.to_dict())
    assert pickle.loads(pickle.dumps(made)) == plain


@pytest.mark.parametrize(
    "wrong", [np.float32("nan"), torch.tensor(float("inf")), torch.tensor([1.0, 2.0]), np.bool_(True), torch.tensor(True)]
)
def test_what_is_no_number_is_still_refused(wrong):
    with pytest.raises(ConfigError, match="finite number"):
        AttentionConfig(strength=wrong)


@pytest.mark.parametrize("wrong", [np.float32(0.5), torch.tensor(0.5), np.bool_(True)])
def test_what_is_no_index_is_still_refused(wrong):
    with pytest.raises(ConfigError, match="integers"):
        AttentionConfig(heads={1: (wrong,)})


def test_a_block_of_strength_takes_scalars_too():
    model, inputs = steered("qwen2"), prompt("qwen2")
    said = Saliency.from_tokens(torch.randn(1, 9))
    found = []
    for number in (1.0, np.float32(1), torch.tensor(1.0)):
        with use_strength(model, number):
            found.append(logits(model, inputs, said))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_config_does_not_change_with_what_it_was_given():
    heads = {1: [0, 3]}
    config = AttentionConfig(heads=heads, saliency=SaliencyConfig(source=None))
    heads[1].append(2)
    heads[2] = "all"
    assert config == AttentionConfig(heads={1: (0, 3)}, saliency=SaliencyConfig(source=None))
