"""A zoo: a tiny random model of (nearly) every architecture of the installed transformers that reads or writes text.

`architectures()` lists them, `tiny_model("qwen2_vl")` builds one, and `tiny_inputs(model)` is a batch that its forward pass takes.
"""

from hf_steer.testing.zoo.catalogue import Architecture, architectures
from hf_steer.testing.zoo.inputs import tiny_inputs
from hf_steer.testing.zoo.models import tiny_config, tiny_model

__all__ = ["Architecture", "architectures", "tiny_config", "tiny_inputs", "tiny_model"]
