"""Aligners that read the prompt's text beside the features: a shared space, a fusion, and an adapter.

Features and text are `(batch, tokens, size)`, masks `(batch, tokens)` bool with True for real tokens. The features ask
(query), the text answers (key and value): what comes out is a text-conditioned view of the features in the text's space.
With features and text of one size all three start as the identity; with other sizes there is none to start from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_steer.aligners.routing import Routing, route
from hf_steer.aligners.single import Init, check_routing, check_sizes, make_vectors
from hf_steer.aligners.skinny import Router, add_steering, check_features, full_precision
from hf_steer.errors import AlignerError


class CrossAttention(nn.Module):
    """Multi-head attention of features to text. `nn.MultiheadAttention` reads its output projection's weight without calling
    it, which under accelerate's offload lies on the meta device; here every weight is reached through its module.

    Args:
        size: of queries, keys and values; a multiple of num_heads.
        num_heads: at least 1.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.size, self.num_heads = size, num_heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, asking: Tensor, answers: Tensor, real: Tensor, *, weights: bool) -> tuple[Tensor, Tensor | None]:
        """`(batch, queries, size)` attends to the real ones of `(batch, keys, size)`; the heads' mean weights on request."""
        q, k, v = (
            projection(values).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, values in ((self.q_proj, asking), (self.k_proj, answers), (self.v_proj, answers))
        )
        mask = real[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mean = None
        if weights:
            logits = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
            mean = logits.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        return self.out_proj(attended.transpose(1, 2).flatten(-2)), mean


class CrossModalFeatureAligner(nn.Module):
    """Project both modalities into a shared space, let features attend to text there, project into the text's space.

    Args:
        audio_dim: size of a feature (audio or vision).
        text_dim: size of a text embedding, and of the output.
        hidden_dim: size of the shared space, a multiple of num_heads.
        num_heads: of the cross-attention.
        residual: add the features to the output; None for "when both sizes are equal". The last projection then starts at
            zero. Without it this is the seed's module to the letter.

    Raises:
        AlignerError: sizes that do not fit together.
    """

    def __init__(
        self, audio_dim: int, text_dim: int, hidden_dim: int, *, num_heads: int = 8, residual: bool | None = None
    ) -> None:
        super().__init__()
        check_sizes(audio_dim=audio_dim, text_dim=text_dim, hidden_dim=hidden_dim, num_heads=num_heads)
        check_heads("hidden_dim", hidden_dim, num_heads)
        self.residual = resolve_residual(residual, audio_dim, text_dim)
        self.audio_projection = nn.Linear(audio_dim, hidden_dim)
        self.text_projection = nn.Linear(text_dim, hidden_dim)
        self.cross_attention = CrossAttention(hidden_dim, num_heads)
        self.alignment_layer = nn.Linear(hidden_dim, text_dim)
        if self.residual:
            start_at_zero(self.alignment_layer)

    def forward(
        self, features: Tensor, text: Tensor, *, mask: Tensor | None = None, text_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:  # fmt: skip
        """Align `(batch, tokens, audio_dim)` with `(batch, text tokens, text_dim)`.

        Returns:
            `(batch, tokens, text_dim)`; padded features come back as they are (zero without a residual). With
            `return_routing` also the attention over text tokens, `(batch, tokens, text tokens)`.

        Raises:
            AlignerError: sizes or masks that do not fit, or a row of text without one real token.
        """
        sizes = self.audio_projection.in_features, self.text_projection.in_features
        text_mask = check_streams(features, text, mask, text_mask, *sizes)
        kind = self.text_projection.weight.dtype
        asking, answers = self.audio_projection(features.to(kind)), self.text_projection(text.to(kind))
        attended, weights = self.cross_attention(asking, answers, text_mask, weights=return_routing)
        return finish(features, self.alignment_layer(attended), mask, weights, residual=self.residual)


class ModalitySpecificSteering(nn.Module):
    """Steer each modality with its own router, then fuse each feature with the mean of the row's steered text.

    Args:
        audio_dim: size of a feature (audio or vision).
        text_dim: size of a text embedding, and of the output.
        num_experts: steering vectors per modality, at least 1.
        top_k: experts per token, 1 to num_experts; None for all.
        temperature: of the softmax, above 0.
        init: of the steering vectors, see `SteerMoEAligner`.
        init_scale: above 0.

    Raises:
        AlignerError: a size or an option out of its range.
    """

    def __init__(
        self, audio_dim: int, text_dim: int, num_experts: int, *, top_k: int | None = None, temperature: float = 1.0,
        init: Init = "zeros", init_scale: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(audio_dim=audio_dim, text_dim=text_dim, num_experts=num_experts)
        check_routing(num_experts, top_k, temperature)
        self.top_k, self.temperature = top_k, temperature
        self.audio_router, self.text_router = Router(audio_dim, num_experts), Router(text_dim, num_experts)
        self.audio_steering = make_vectors((num_experts, audio_dim), init, init_scale)
        self.text_steering = make_vectors((num_experts, text_dim), init, init_scale)
        self.fusion_layer = nn.Linear(audio_dim + text_dim, text_dim)
        if audio_dim == text_dim:  # [I, 0]: the steered features themselves
            with torch.no_grad():
                self.fusion_layer.weight.copy_(torch.eye(text_dim, audio_dim + text_dim))
                self.fusion_layer.bias.zero_()

    def forward(
        self, features: Tensor, text: Tensor, *, mask: Tensor | None = None, text_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:  # fmt: skip
        """Align `(batch, tokens, audio_dim)` with `(batch, text tokens, text_dim)`.

        Returns:
            `(batch, tokens, text_dim)`; with `return_routing` also the `Routing` of the features (`"audio"`).

        Raises:
            AlignerError: sizes or masks that do not fit, or a row of text without one real token.
        """
        sizes = self.audio_steering.shape[1], self.text_steering.shape[1]
        text_mask = check_streams(features, text, mask, text_mask, *sizes)
        with full_precision(features):
            logits, features = self.audio_router(features)
            scores, probabilities = route(logits, temperature=self.temperature, top_k=self.top_k)
            heard = add_steering(features, scores, self.audio_steering)
            text_logits, text = self.text_router(text)
            text_scores, _ = route(text_logits, temperature=self.temperature, top_k=self.top_k)
            read = masked_mean(add_steering(text, text_scores, self.text_steering), text_mask)
            both = torch.cat([heard, read.to(heard.dtype).unsqueeze(1).expand(-1, heard.shape[1], -1)], -1)
            fused = self.fusion_layer(both.to(self.fusion_layer.weight.dtype)).to(features.dtype)
        if mask is not None:
            unfused = features if sizes[0] == sizes[1] else torch.zeros_like(fused)
            fused = torch.where(mask.bool().unsqueeze(-1), fused, unfused)
        return (fused, Routing({"audio": scores}, {"audio": probabilities})) if return_routing else fused


class CrossModalAdapter(nn.Module):
    """A bottleneck adapter into the text's space, then attention to the text.

    Args:
        audio_dim: size of a feature (audio or vision).
        text_dim: size of a text embedding, and of the output; a multiple of num_heads.
        adapter_dim: size of the bottleneck.
        num_heads: of the cross-attention.
        residual: add the features to the output; None for "when both sizes are equal". The attention's output projection
            then starts at zero. Without it this is the seed's module to the letter.

    Raises:
        AlignerError: sizes that do not fit together.
    """

    def __init__(
        self, audio_dim: int, text_dim: int, adapter_dim: int, *, num_heads: int = 8, residual: bool | None = None
    ) -> None:
        super().__init__()
        check_sizes(audio_dim=audio_dim, text_dim=text_dim, adapter_dim=adapter_dim, num_heads=num_heads)
        check_heads("text_dim", text_dim, num_heads)
        self.residual = resolve_residual(residual, audio_dim, text_dim)
        self.audio_dim = audio_dim
        self.audio_adapter = nn.Sequential(nn.Linear(audio_dim, adapter_dim), nn.ReLU(), nn.Linear(adapter_dim, text_dim))
        self.cross_attention = CrossAttention(text_dim, num_heads)
        if self.residual:
            start_at_zero(self.cross_attention.out_proj)

    def forward(
        self, features: Tensor, text: Tensor, *, mask: Tensor | None = None, text_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:  # fmt: skip
        """As `CrossModalFeatureAligner.forward`."""
        text_mask = check_streams(features, text, mask, text_mask, self.audio_dim, self.cross_attention.size)
        kind = self.cross_attention.q_proj.weight.dtype
        adapted = self.audio_adapter(features.to(kind))
        attended, weights = self.cross_attention(adapted, text.to(kind), text_mask, weights=return_routing)
        return finish(features, attended, mask, weights, residual=self.residual)


def finish(
    features: Tensor, delta: Tensor, mask: Tensor | None, weights: Tensor | None, *, residual: bool
) -> Tensor | tuple[Tensor, Routing]:
    """The output in the features' precision, padded features left alone."""
    delta = delta.to(features.dtype)
    if mask is not None:
        delta = delta * mask.unsqueeze(-1).to(delta)
    output = features + delta if residual else delta
    return output if weights is None else (output, Routing({"attention": weights.float()}, {}))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each row, `(batch, size)`."""
    real = mask.unsqueeze(-1)
    total: Tensor = values.masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return total


def resolve_residual(residual: bool | None, audio_dim: int, text_dim: int) -> bool:
    """Whether features are added to the output, which needs one size."""
    if residual and audio_dim != text_dim:
        raise AlignerError(
            f"residual=True adds features of size {audio_dim} to an output of size {text_dim}; give both one size, or "
            "residual=False."
        )
    return audio_dim == text_dim if residual is None else residual


def start_at_zero(layer: nn.Linear) -> None:
    """A layer that says nothing yet."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def check_heads(name: str, size: int, num_heads: int) -> None:
    """Heads of one whole size."""
    if size % num_heads:
        raise AlignerError(f"{name} ({size}) must be a multiple of num_heads ({num_heads}); choose another of the two.")


def check_streams(
    features: Tensor, text: Tensor, mask: Tensor | None, text_mask: Tensor | None, audio_dim: int, text_dim: int
) -> Tensor:
    """Sizes and masks that fit, and text in every row; returns the text's mask."""
    check_features(features, audio_dim)
    check_features(text, text_dim, what="text")
    if features.ndim != 3 or text.ndim != 3 or features.shape[0] != text.shape[0]:
        raise AlignerError(
            f"features {tuple(features.shape)} and text {tuple(text.shape)} must both be (batch, tokens, size), with one batch."
        )
    for name, values, given in (("mask", features, mask), ("text_mask", text, text_mask)):
        if given is not None and given.shape != values.shape[:2]:
            raise AlignerError(f"{name} has shape {tuple(given.shape)}; needed is {tuple(values.shape[:2])}, True for real tokens.")
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    text_mask = text_mask.bool()
    if not torch.compiler.is_compiling() and not bool(text_mask.any(1).all()):
        rows = (~text_mask.any(1)).nonzero().flatten().tolist()
        raise AlignerError(f"the text of rows {rows} has no real token to attend to; give each row's prompt at least one word.")
    return text_mask
