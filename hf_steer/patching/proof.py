"""stub"""

from hf_steer.values import Plan


def prove_steering(plan: Plan) -> None:
    """Later."""
