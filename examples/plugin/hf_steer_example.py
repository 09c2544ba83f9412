"""A plugin of hf_steer: a gate, a source, a router, a backend and a family, a row each.

Install it (`pip install ./examples/plugin`), and `GateConfig("doubt")`, `SaliencyConfig(source="novelty")`,
`AlignerConfig("image", kind="low_rank")`, `AttentionConfig(backend="written_out")` and models of type `smollm3` are there.
hf_steer finds it by its entry point, when one of these names is first asked for.
"""

import torch
from torch import nn

import hf_steer
from hf_steer.attention import logits_in_chunks


def doubt(logits):
    """`(rows, vocabulary)` -> `(rows,)`: what the likeliest token leaves to the others."""
    return 1 - logits.float().softmax(-1).amax(-1)


def novelty(sight, power):
    """`(rows, tokens)`: how far each token lies from the mean of its prompt."""
    embeds = sight.embeds.float()
    return (embeds - embeds.mean(1, keepdim=True)).norm(dim=-1) ** power


class LowRank(nn.Module):
    """`h + up(down(h))`; `up` starts at zero, so that a fresh one changes nothing."""

    def __init__(self, features, rank):
        super().__init__()
        self.down, self.up = nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features):
        return features + self.up(self.down(features.to(self.down.weight.dtype))).to(features.dtype)


def attend(call, bias):
    """Softmax of logits and bias, written out in float32."""
    value = call.value.float().repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
    parts = [(logits + added).softmax(-1) @ value for _, logits, added in logits_in_chunks(call)]
    return torch.cat(parts, dim=2).transpose(1, 2).to(call.query.dtype), None


def refuse(call):
    """Why it cannot carry the bias of a call."""
    if call.sinks or call.dropped or call.added is not None:
        return "it knows no sinks, no dropout and no bias of the model's own"
    return None


def register():
    """What the entry point names; hf_steer calls it once."""
    hf_steer.register_gate("doubt", hf_steer.Gate(measures=doubt, options={"threshold": 0.5, "release": 0.4}))
    hf_steer.register_source("novelty", hf_steer.Source(prompt=novelty, options={"power": 1.0}))
    hf_steer.register_router("low_rank", hf_steer.Router(build=low_rank, options={"rank": 8}, routes=False))
    hf_steer.register_backend("written_out", hf_steer.Backend(attend=attend, refuse=refuse, over=("eager", "sdpa")))
    hf_steer.register_family("smollm3", hf_steer.Family(composes=True))


def low_rank(config, features, layers):
    """From a configuration, the size of a feature and the number of layers to a module."""
    return LowRank(features, config.options["rank"])
