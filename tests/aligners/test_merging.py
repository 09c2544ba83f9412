"""Experts merged by sequence: one vector for all of its tokens, by the mean of their scores, in which padding has no part."""

from __future__ import annotations

import pytest
import torch

from hf_steer.aligners import HierarchicalRouter, ProgressiveRouter, SteerMoEAligner
from hf_steer.errors import AlignerError

SIZE = 12
KINDS = {
    "simple": lambda **own: SteerMoEAligner(SIZE, 5, **own),
    "hierarchical": lambda **own: HierarchicalRouter(SIZE, 5, 3, **own),
    "progressive-scores": lambda **own: ProgressiveRouter(SIZE, 5, 3, **own),
    "progressive-steering": lambda **own: ProgressiveRouter(SIZE, 5, 3, feedback="steering", **own),
}
every = pytest.mark.parametrize("name", KINDS)
MASK = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])


def pair(name):
    """The same weights, merging and not."""
    torch.manual_seed(0)
    merging, plain = KINDS[name](merge=True).double(), KINDS[name]().double()
    with torch.no_grad():
        for parameter in merging.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    plain.load_state_dict(merging.state_dict())
    return merging, plain


def some_features():
    return torch.randn(2, 5, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_simple_kind_adds_the_vector_that_the_mean_of_the_real_tokens_scores_makes():
    merging, _ = pair("simple")
    features = some_features()
    steered = merging(features, mask=MASK)
    for row in range(2):
        scores = [torch.softmax(merging.router.weight @ token + merging.router.bias, 0)
                  for token, real in zip(features[row], MASK[row], strict=True) if real]  # fmt: skip
        mean = sum(scores) / len(scores)
        vector = sum(weight * own for weight, own in zip(mean, merging.steering_vectors, strict=True))
        torch.testing.assert_close(steered[row], features[row] + vector)


@every
def test_all_tokens_of_a_sequence_are_steered_alike_and_those_of_another_otherwise(name):
    merging, plain = pair(name)
    features = some_features()
    steering = merging(features, mask=MASK) - features
    torch.testing.assert_close(steering, steering[:, :1].expand_as(steering))
    assert not torch.allclose(steering[0, 0], steering[1, 0])
    apart = plain(features) - features
    assert not torch.allclose(apart, apart[:, :1].expand_as(apart))


@every
def test_where_one_expert_has_all_the_weight_merging_changes_nothing(name):
    merging, plain = pair(name)
    for module in (merging, plain):
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key.startswith(("router", "feedback")):
                    parameter.zero_()
            module.router.bias[::5] = 200.0  # of every router one; what lies between them does not matter
    features = some_features()
    torch.testing.assert_close(merging(features, mask=MASK), plain(features))


@every
def test_a_sequence_of_one_token_is_steered_as_ever(name):
    merging, plain = pair(name)
    features = some_features()[:, :1]
    torch.testing.assert_close(merging(features), plain(features))


@every
def test_padding_never_counts(name):
    merging, _ = pair(name)
    features = some_features()
    other = torch.where(MASK[..., None], features, 100.0)
    torch.testing.assert_close(merging(features, mask=MASK)[MASK], merging(other, mask=MASK)[MASK])
    assert not torch.allclose(merging(features)[MASK], merging(other)[MASK])
    torch.testing.assert_close(merging(features, mask=MASK)[:1, 2:], merging(features[:1, 2:]))
    nobody = merging(features, mask=torch.zeros_like(MASK))
    torch.testing.assert_close(nobody, features)


@every
def test_the_routing_is_that_of_the_sequence(name):
    merging, _ = pair(name)
    features = some_features()
    _, routing = merging(features, mask=MASK, return_routing=True)
    for own in routing.scores.values():
        assert own.shape[:-1] == MASK.shape
        torch.testing.assert_close(own, own[:, :1].expand_as(own))
        torch.testing.assert_close(own[0].sum(-1), torch.ones(5, dtype=own.dtype))
    assert routing.load_balancing_loss(MASK) >= 1


@every
def test_every_parameter_gets_the_gradient_of_the_formula(name):
    merging, _ = pair(name)
    features = some_features().requires_grad_()

    def steered(own, *values):
        return torch.func.functional_call(merging, dict(zip(names, values, strict=True)), (own,), {"mask": MASK}).sin()

    names = [name for name, _ in merging.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in merging.parameters()]
    assert torch.autograd.gradcheck(steered, (features, *values))
    steered(features, *values).sum().backward()
    assert all(value.grad.abs().max() > 0 for value in values)


@every
def test_merging_and_selecting_do_not_go_together(name):
    with pytest.raises(AlignerError, match="blends all experts"):
        KINDS[name](merge=True, top_k=2)
