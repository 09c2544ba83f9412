"""The contract as a function, for models and families of one's own: `check_family(model, inputs)`."""

from hf_steer.testing.family import check_family
from hf_steer.testing.promises import PROMISES, Promise
from hf_steer.testing.report import Check, ContractReport

__all__ = ["PROMISES", "Check", "ContractReport", "Promise", "check_family"]
