"""Pure tensors in, one score per vision, audio or text token out."""

from hf_steer.registry import SOURCES
from hf_steer.saliency.cuts import Cut
from hf_steer.saliency.eyes import EyeRecord, EyeRecorder, Segment, attention_received, current_recorder, record_with
from hf_steer.saliency.given import Saliency
from hf_steer.saliency.layouts import read_layouts
from hf_steer.saliency.llava import CUTS
from hf_steer.saliency.maps import map_of
from hf_steer.saliency.normalize import NORMALIZERS, is_lost, normalize, put_into_effect
from hf_steer.saliency.picture_files import open_upright
from hf_steer.saliency.sounds import frames_of
from hf_steer.saliency.sources import Sight
from hf_steer.saliency.spans import find_spans
from hf_steer.saliency.tokens import scores_from_eyes, scores_from_prompt, scores_from_user
from hf_steer.saliency.units import UNITS

__all__ = [
    "CUTS",
    "NORMALIZERS",
    "SOURCES",
    "UNITS",
    "Cut",
    "EyeRecord",
    "EyeRecorder",
    "Saliency",
    "Segment",
    "Sight",
    "attention_received",
    "current_recorder",
    "find_spans",
    "frames_of",
    "is_lost",
    "map_of",
    "normalize",
    "open_upright",
    "put_into_effect",
    "read_layouts",
    "record_with",
    "scores_from_eyes",
    "scores_from_prompt",
    "scores_from_user",
]
