"""Aligners as pure modules: against the seed's formulas in fp64, as the identity, and in what they report."""

from __future__ import annotations

import math

import pytest
import torch
from kit import aligner_oracle as oracle
from torch import nn

from hf_steer.aligners import (
    CrossModalAdapter,
    CrossModalFeatureAligner,
    HierarchicalRouter,
    LayerWiseSteering,
    ModalitySpecificSteering,
    ProgressiveRouter,
    SteerMoEAligner,
)
from hf_steer.errors import AlignerError

SIZE, EXPERTS = 24, 5
SINGLE = {
    "simple": (SteerMoEAligner, (SIZE, EXPERTS), {}, oracle.simple),
    "hierarchical": (HierarchicalRouter, (SIZE, EXPERTS, 3), {}, oracle.hierarchical),
    "progressive-scores": (ProgressiveRouter, (SIZE, EXPERTS, 3), {"feedback": "scores"}, oracle.progressive),
    "progressive-steering": (ProgressiveRouter, (SIZE, EXPERTS, 3), {"feedback": "steering"}, oracle.progressive),
    "layer-wise": (LayerWiseSteering, (SIZE, EXPERTS, 4), {}, oracle.layer_wise),
}
CROSS = {
    "features": (CrossModalFeatureAligner, {"hidden_dim": 16, "num_heads": 4}, oracle.cross_modal_features),
    "specific": (ModalitySpecificSteering, {"num_experts": EXPERTS}, oracle.modality_specific),
    "adapter": (CrossModalAdapter, {"adapter_dim": 8, "num_heads": 4}, oracle.cross_modal_adapter),
}
singles = pytest.mark.parametrize("name", SINGLE)
crosses = pytest.mark.parametrize("name", CROSS)


def make(name, **options):
    """A module with weights that are all far from zero, and how to call it."""
    kind, sizes, own, formula = SINGLE[name]
    module = kind(*sizes, **own, **options)
    randomize(module)
    where = (2,) if name == "layer-wise" else ()
    return module, where, formula


def randomize(module, scale=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * scale)


def make_cross(name, text_dim=SIZE, **options):
    kind, own, formula = CROSS[name]
    return kind(SIZE, text_dim, **own, **options), formula


def streams(text_dim=SIZE, **kind):
    features, text = torch.randn(3, 7, SIZE, **kind), torch.randn(3, 5, text_dim, **kind)
    mask, text_mask = torch.ones(3, 7, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 4:] = False
    text_mask[0, :2] = False
    text_mask[2, 1:] = False
    return features, text, mask, text_mask


@singles
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("shape", [(SIZE,), (6, SIZE), (2, 3, 2, SIZE)], ids=str)
def test_routers_follow_the_seeds_formulas(name, options, shape):
    module, where, formula = make(name, **options)
    features = torch.randn(shape)
    expected = formula(module, features, *where, **options)
    assert (expected - features).abs().max() > 0.1
    torch.testing.assert_close(module(features, *where), expected.float().reshape(shape))
    torch.testing.assert_close(module.double()(features.double(), *where), expected.reshape(shape))


@singles
def test_gradients_are_those_of_the_formulas(name):
    module, where, formula = make(name)
    module.double()
    features = torch.randn(4, SIZE, dtype=torch.double, requires_grad=True)
    direction = torch.randn(4, SIZE, dtype=torch.double)
    literal = formula_with_gradients(module, name, features, where)
    wanted = torch.autograd.grad((literal * direction).sum(), inputs(module, features))
    got = torch.autograd.grad((module(features, *where) * direction).sum(), inputs(module, features))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        formula_with_gradients(module, name, features, where), formula(module, features, *where), check_dtype=False
    )


def inputs(module, features):
    return [features, *module.parameters()]


def formula_with_gradients(module, name, features, where):
    """The seed's own lines, batched, as autograd differentiates them."""
    weight, bias = module.router.weight, module.router.bias
    if name == "simple":
        return features + torch.softmax(features @ weight.T + bias, -1) @ module.steering_vectors
    if name == "hierarchical":
        groups, experts, _ = module.local_steering.shape
        g = torch.softmax(features @ weight[:groups].T + bias[:groups], -1)
        total = features + g @ module.global_steering
        for group in range(groups):
            rows = slice(groups + group * experts, groups + (group + 1) * experts)
            local = torch.softmax(features @ weight[rows].T + bias[rows], -1) @ module.local_steering[group]
            total = total + g[:, group : group + 1] * local
        return total
    if name == "layer-wise":
        layers, experts, _ = module.steering_vectors.shape
        scores = torch.softmax((features @ weight.T + bias).unflatten(-1, (layers, experts))[:, where[0]], -1)
        unused = 0 * sum(parameter.sum() for parameter in module.parameters())
        return features + module.layer_scales[where[0]] * (scores @ module.steering_vectors[where[0]]) + unused
    stages, experts, _ = module.stage_steering.shape
    accumulated, earlier = torch.zeros_like(features), []
    for stage in range(stages):
        rows = slice(stage * experts, (stage + 1) * experts)
        logits = features @ weight[rows].T + bias[rows]
        if stage:
            seen = torch.cat(earlier, -1) if module.feedback == "scores" else accumulated
            logits = logits + seen @ getattr(module, f"feedback_{stage}").T
        earlier.append(torch.softmax(logits, -1))
        accumulated = accumulated + earlier[-1] @ module.stage_steering[stage]
    return features + accumulated


@crosses
@pytest.mark.parametrize("text_dim", [SIZE, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_modal_aligners_follow_the_seeds_formulas(name, text_dim, masked):
    """Without a residual where the formula has none; padding on either side changes nothing for real tokens."""
    literal = {} if name == "specific" else {"residual": False}
    module, formula = make_cross(name, text_dim, **literal)
    randomize(module)
    features, text, mask, text_mask = streams(text_dim)
    if not masked:
        mask, text_mask = torch.ones_like(mask), torch.ones_like(text_mask)
    expected = formula(module, features, text, text_mask).float()
    got = module(features, text, mask=mask, text_mask=text_mask)
    torch.testing.assert_close(got[mask], expected[mask])
    loud = text.masked_fill(~text_mask.unsqueeze(-1), 1e4)
    torch.testing.assert_close(module(features, loud, mask=mask, text_mask=text_mask), got)


@crosses
def test_cross_modal_residual_adds_the_features(name):
    if name == "specific":
        module, formula = make_cross(name)  # its fusion starts as [I, 0], which is the formula itself
        features, text, mask, text_mask = streams()
        torch.testing.assert_close(module(features, text, text_mask=text_mask), formula(module, features, text, text_mask).float())
        return
    module, formula = make_cross(name)
    randomize(module)
    features, text, mask, text_mask = streams()
    expected = features + formula(module, features, text, text_mask).float()
    got = module(features, text, mask=mask, text_mask=text_mask)
    torch.testing.assert_close(got[mask], expected[mask])
    assert torch.equal(got[~mask], features[~mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SINGLE, *CROSS])
def test_a_fresh_aligner_is_the_identity_to_the_last_bit(name, dtype):
    if name in SINGLE:
        kind, sizes, own, _ = SINGLE[name]
        features = torch.randn(3, 11, SIZE).to(dtype)
        where = (3,) if name == "layer-wise" else ()
        assert torch.equal(kind(*sizes, **own)(features, *where), features)
        assert not torch.equal(kind(*sizes, **own, init="normal", init_scale=1.0)(features, *where), features)
    else:
        features, text, mask, text_mask = (value.to(dtype) if value.is_floating_point() else value for value in streams())
        module, _ = make_cross(name)
        assert torch.equal(module(features, text, mask=mask, text_mask=text_mask), features)
        randomize(module)
        assert not torch.equal(module(features, text, mask=mask, text_mask=text_mask), features)


@singles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_float32_whatever_the_features_are(name, dtype):
    """Softmax, selection and statistics are not rounded; on a CPU the logits are those of a product in half precision."""
    module, where, _ = make(name)
    features = (torch.randn(2500, SIZE) * 3).to(dtype)
    steered, routing = module(features, *where, return_routing=True)
    assert steered.dtype == dtype
    logits, carried = module.router(features)
    assert logits.dtype == torch.float32
    assert torch.equal(carried, features)
    assert torch.equal(logits, (features @ module.router.weight.to(dtype).t()).float() + module.router.bias)
    rounding = torch.finfo(dtype).eps * module.router(features.float())[0].abs().max()
    wide, expected = module(features.float(), *where, return_routing=True)
    for router, scores in routing.scores.items():
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.sum(-1), torch.ones(2500))
        assert ((scores - expected.scores[router]).abs() <= 8 * rounding * expected.scores[router] + 1e-4).all()
    assert (steered.float() - wide).abs().max() < 8 * rounding * wide.abs().max()
    if name == "simple":
        torch.testing.assert_close(routing.scores["experts"], logits.softmax(-1))


@singles
def test_half_precision_gradients_are_near_those_of_float32(name):
    module, where, _ = make(name)
    features = torch.randn(1500, SIZE).bfloat16()
    gradients = []
    for kind in (torch.bfloat16, torch.float32):
        module.zero_grad()
        own = features.clone().to(kind).requires_grad_()
        module(own, *where).float().pow(2).mean().backward()
        gradients.append([own.grad.float(), *(parameter.grad for parameter in module.parameters())])
    for half, full in zip(*gradients, strict=True):
        assert half.dtype == torch.float32
        assert (half - full).norm() < 0.02 * full.norm()  # bf16 keeps eight bits


@singles
def test_autocast_changes_neither_the_precision_nor_the_result(name):
    module, where, _ = make(name)
    features = torch.randn(9, SIZE)
    plain = module(features, *where)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(features, *where), plain)


@singles
def test_routing_is_returned_on_request_and_kept_nowhere(name):
    module, where, _ = make(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    attributes = {id(inner): set(vars(inner)) for inner in module.modules()}
    features = torch.randn(4, 6, SIZE)
    steered, routing = module(features, *where, return_routing=True)
    assert torch.equal(steered, module(features, *where))
    assert attributes == {id(inner): set(vars(inner)) for inner in module.modules()}
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for router, scores in routing.scores.items():
        experts = scores.shape[-1]
        assert scores.shape[:-1] == (4, 6)
        torch.testing.assert_close(scores.sum(-1), torch.ones(4, 6))
        torch.testing.assert_close(routing.usage()[router], scores.mean((0, 1)))
        wins = torch.bincount(scores.argmax(-1).flatten(), minlength=experts) / 24
        torch.testing.assert_close(routing.load()[router], wins.float())
        torch.testing.assert_close(routing.entropy()[router], -(scores * scores.log()).sum(-1).mean())
        assert 0 < routing.entropy()[router] < math.log(experts)


@crosses
def test_cross_modal_routing_is_the_attention_or_the_features_router(name):
    module, _ = make_cross(name)
    randomize(module)
    features, text, mask, text_mask = streams()
    _, routing = module(features, text, mask=mask, text_mask=text_mask, return_routing=True)
    if name == "specific":
        assert routing.scores["audio"].shape == (3, 7, EXPERTS)
        assert routing.load_balancing_loss(mask).item() > 1
    else:
        weights = routing.scores["attention"]
        assert weights.shape == (3, 7, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))
        assert (weights[0, :, :2] == 0).all()
        assert routing.load_balancing_loss(mask).item() == 0


@singles
def test_top_k_leaves_only_the_chosen_experts(name):
    module, where, _ = make(name, top_k=2)
    _, routing = module(torch.randn(40, SIZE), *where, return_routing=True)
    for router, scores in routing.scores.items():
        chosen = 3 if router == "global" else 2
        assert ((scores > 0).sum(-1) == chosen).all()
        assert (routing.probabilities[router] > 0).all()


@pytest.mark.parametrize("top_k", [None, 2])
def test_load_balancing_loss_is_one_when_balanced_and_more_when_not(top_k):
    module = SteerMoEAligner(SIZE, EXPERTS, top_k=top_k)
    nn.init.zeros_(module.router.weight)
    nn.init.zeros_(module.router.bias)
    features = torch.randn(3, 50, SIZE)
    if top_k is None:
        torch.testing.assert_close(module(features, return_routing=True)[1].load_balancing_loss(), torch.tensor(1.0))
    with torch.no_grad():
        module.router.bias[1] = 50.0
        module.router.bias[3] = 49.0
    loss = module(features, return_routing=True)[1].load_balancing_loss()
    expected = EXPERTS * (0.7310586**2 + 0.2689414**2) if top_k is None else EXPERTS / 2
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 2])
def test_training_on_the_loss_balances_the_load(top_k):
    module = SteerMoEAligner(SIZE, EXPERTS, top_k=top_k)
    with torch.no_grad():
        module.router.bias[1] += 3.0
    features = torch.randn(8, 30, SIZE)
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.05)
    first = module(features, return_routing=True)[1].usage()["experts"].max()
    for _ in range(60):
        optimizer.zero_grad()
        module(features, return_routing=True)[1].load_balancing_loss().backward()
        optimizer.step()
    assert first > 0.6
    assert module(features, return_routing=True)[1].usage()["experts"].max() < 0.35


@pytest.mark.parametrize("top_k", [None, 2])
def test_padding_has_no_part_in_any_statistic(top_k):
    module, _, _ = make("simple", top_k=top_k)
    features, _, mask, _ = streams()
    loud = features.masked_fill(~mask.unsqueeze(-1), 100.0)
    one, other = (module(value, return_routing=True)[1] for value in (features, loud))
    for read in ("usage", "load", "entropy"):
        torch.testing.assert_close(getattr(one, read)(mask), getattr(other, read)(mask))
    torch.testing.assert_close(one.load_balancing_loss(mask), other.load_balancing_loss(mask))
    assert one.load_balancing_loss() != other.load_balancing_loss()
    gone = mask.clone()
    gone[2] = False  # a sequence of padding alone does not count
    alone = module(features[:2], return_routing=True)[1]
    torch.testing.assert_close(one.load_balancing_loss(gone), alone.load_balancing_loss(mask[:2]))


def test_the_loss_does_not_depend_on_how_sequences_are_batched():
    module, _, _ = make("hierarchical")
    features = torch.randn(4, 9, SIZE)
    whole = module(features, return_routing=True)[1].load_balancing_loss()
    halves = [module(half, return_routing=True)[1].load_balancing_loss() for half in features.chunk(2)]
    torch.testing.assert_close(whole, sum(halves) / 2)


@singles
def test_no_tensor_of_tokens_by_features_by_experts_is_made(name):
    """The largest tensor that a forward pass makes is as large as its output."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    Watch.largest = max(Watch.largest, value.numel())
            Watch.calls += 1
            return out

    counts = []
    for experts in (4, 16):  # and no loop over experts either
        kind, sizes, own, _ = SINGLE[name]
        module = kind(256, experts, *sizes[2:], **own)
        features = torch.randn(2, 100, 256)
        Watch.calls = 0
        with Watch(), torch.no_grad():
            module(features, *((1,) if name == "layer-wise" else ()))
        counts.append(Watch.calls)
        assert Watch.largest <= max(features.numel(), sum(parameter.numel() for parameter in module.parameters()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("compiled", ["simple", "hierarchical", "progressive-steering", "layer-wise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligners_compile_without_a_graph_break(compiled, dtype):
    module, where, _ = make(compiled)
    features = torch.randn(3, 5, SIZE).to(dtype)
    fast = torch.compile(lambda value: module(value, *where), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(features), module(features, *where))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SteerMoEAligner(8, 0), "num_experts must be a whole number of at least 1; got 0"),
        (lambda: HierarchicalRouter(8, 4, 0), "num_global_experts must be .* got 0"),
        (lambda: ProgressiveRouter(8, 4, 0), "num_stages must be .* got 0"),
        (lambda: LayerWiseSteering(8, 4, 0), "num_layers must be .* got 0"),
        (lambda: SteerMoEAligner(8, 4, top_k=5), r"top_k must be 1 to num_experts \(4\), or None for all; got 5"),
        (lambda: SteerMoEAligner(8, 4, top_k=0), "top_k must be 1 to num_experts"),
        (lambda: SteerMoEAligner(8, 4, temperature=0.0), "temperature must be a number above 0; got 0.0"),
        (lambda: SteerMoEAligner(8, 4, init="ones"), "init must be 'zeros' or 'normal'; got 'ones'"),
        (lambda: SteerMoEAligner(8, 4, init="normal", init_scale=0.0), "init_scale must be above 0"),
        (lambda: ProgressiveRouter(8, 4, feedback="all"), "feedback must be 'scores' or 'steering'; got 'all'"),
        (lambda: SteerMoEAligner(8, 4)(torch.randn(2, 9)), r"features of shape \(2, 9\) came.*last dimension of 8.*hidden_size"),
        (lambda: LayerWiseSteering(8, 4, 3)(torch.randn(2, 8), 3), "layer 3 is not there; .* 3 layers, 0 to 2"),
        (lambda: CrossModalFeatureAligner(8, 8, 12, num_heads=8), r"hidden_dim \(12\) must be a multiple of num_heads \(8\)"),
        (lambda: CrossModalAdapter(8, 12, 4), r"text_dim \(12\) must be a multiple of num_heads \(8\)"),
        (lambda: CrossModalAdapter(8, 16, 4, residual=True), "residual=True adds features of size 8 to an output of size 16"),
        (lambda: ModalitySpecificSteering(8, 6, 0), "num_experts must be"),
        (lambda: make_cross("features")[0](torch.randn(2, 3, SIZE), torch.randn(2, 3, 9)), r"text of shape \(2, 3, 9\) came"),
        (lambda: make_cross("features")[0](torch.randn(2, 3, SIZE), torch.randn(1, 3, SIZE)), "with one batch"),
        (
            lambda: make_cross("specific")[0](torch.randn(2, 3, SIZE), torch.randn(2, 3, SIZE), mask=torch.ones(2, 4).bool()),
            r"mask has shape \(2, 4\); needed is \(2, 3\)",
        ),
        (
            lambda: SteerMoEAligner(8, 4)(torch.randn(2, 8), return_routing=True)[1].usage(torch.ones(3).bool()),
            r"the mask has shape \(3,\); the features' leading shape is \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(AlignerError, match=message):
        call()


@crosses
def test_text_without_one_real_token_is_refused(name):
    module, _ = make_cross(name)
    features, text, mask, text_mask = streams()
    text_mask[1] = False
    with pytest.raises(AlignerError, match=r"text of rows \[1\] has no real token to attend to"):
        module(features, text, mask=mask, text_mask=text_mask)
