"""Prompts of one's own, from a file with one JSON object a line: about a text, a picture or a sound."""

from hf_steer.analysis.asked.lines import FORMS, Line, read_lines
from hf_steer.analysis.asked.prompts import Asked, Reader, ask, read_asked
from hf_steer.analysis.asked.together import together

__all__ = ["FORMS", "Asked", "Line", "Reader", "ask", "read_asked", "read_lines", "together"]
