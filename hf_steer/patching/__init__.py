"""The one place that touches a live model: plan (every check) · edits (reversible) · runtime · handle."""

from hf_steer.patching.patch import patch_model, print_trainable_parameters, unpatch_model
from hf_steer.patching.plan import make_plan
from hf_steer.patching.scopes import disable_steering, use_saliency
from hf_steer.patching.status import SteerStatus, get_steer_status
from hf_steer.patching.strength import use_strength
from hf_steer.patching.watching.preview import read_saliency
from hf_steer.patching.watching.probe import anatomy_of, probe_attention
from hf_steer.patching.watching.reading import SaliencyReading
from hf_steer.patching.watching.trace import Trace, TraceStep, trace_steering

__all__ = [
    "SaliencyReading",
    "SteerStatus",
    "Trace",
    "TraceStep",
    "anatomy_of",
    "disable_steering",
    "get_steer_status",
    "make_plan",
    "patch_model",
    "print_trainable_parameters",
    "probe_attention",
    "read_saliency",
    "trace_steering",
    "unpatch_model",
    "use_saliency",
    "use_strength",
]
