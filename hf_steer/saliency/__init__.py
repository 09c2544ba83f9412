"""Pure tensors in, one score per vision, audio or text token out."""

from hf_steer.saliency.eyes import EyeRecord, EyeRecorder, attention_received, current_recorder, record_with
from hf_steer.saliency.given import Saliency
from hf_steer.saliency.normalize import NORMALIZERS, normalize
from hf_steer.saliency.spans import find_spans, token_grid
from hf_steer.saliency.tokens import scores_from_eyes, scores_from_user

__all__ = [
    "NORMALIZERS",
    "EyeRecord",
    "EyeRecorder",
    "Saliency",
    "attention_received",
    "current_recorder",
    "find_spans",
    "normalize",
    "record_with",
    "scores_from_eyes",
    "scores_from_user",
    "token_grid",
]
