"""Which heads look where they are told to look: scores, choice, and a report on examples that did not choose."""

from hf_steer.analysis.heads.examples import HeadExample
from hf_steer.analysis.heads.find import find_grounding_heads
from hf_steer.analysis.heads.ready import head_lists, load_heads
from hf_steer.analysis.heads.report import Estimate, HeadReport
from hf_steer.analysis.heads.result import HeadResult
from hf_steer.analysis.heads.rules import RULES

__all__ = [
    "RULES", "Estimate", "HeadExample", "HeadReport", "HeadResult", "find_grounding_heads", "head_lists", "load_heads",
]  # fmt: skip
