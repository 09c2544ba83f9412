"""`hf-steer bench`: every way to steer attention, verified against float64 and timed beside the plain model."""

from hf_steer.evidence.bench.cells import list_cells
from hf_steer.evidence.bench.choices import FULL, QUICK, Choice
from hf_steer.evidence.bench.contenders import choose_contenders
from hf_steer.evidence.bench.run import Bench, run_bench

__all__ = ["FULL", "QUICK", "Bench", "Choice", "choose_contenders", "list_cells", "run_bench"]
