"""What a user's own model keeps of the contract, as it lies there: `hf_steer.verify(model, inputs)`."""

from hf_steer.verify.model import verify
from hf_steer.verify.report import Verification
from hf_steer.verify.rows import BUDGET, PROMISES

__all__ = ["BUDGET", "PROMISES", "Verification", "verify"]
