"""One ordinary model out of a frozen encoder and a frozen text-only decoder."""

from hf_steer.compose.join import compose
from hf_steer.compose.processor import StackingProcessor

__all__ = ["StackingProcessor", "compose"]
