"""Matplotlib, which is imported only here and only when a picture is drawn."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from hf_steer.errors import SteerError
from hf_steer.files import write_whole

BEFORE, AFTER = "#8c96a3", "#d1495b"
CONTROLS = ("#2e4057", "#66a182", "#edae49", "#b18fcf")


def subplots(*shape: int, size: tuple[float, float], **kwargs: Any) -> tuple[Any, Any]:
    """A figure that belongs to nobody: no window, no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SteerError("pictures need matplotlib; install it with: pip install 'hf-steer[demo]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*shape, **kwargs)


def save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write it as a PNG, in a folder that is made when it is not there."""
    target, content = Path(path), io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole(target, content.getvalue())
    return target
