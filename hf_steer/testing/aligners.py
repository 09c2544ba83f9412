"""What is promised of aligners: fresh ones change nothing, and they alone are trained."""

from __future__ import annotations

import torch

from hf_steer.ground.outputs import logits_in
from hf_steer.patching.scopes import steering_of
from hf_steer.testing.compared import bar_for
from hf_steer.testing.report import Finding
from hf_steer.testing.subject import Subject, equal, largest


def fresh(subject: Subject) -> Finding:
    """Just inserted."""
    with subject.patched(subject.aligned):
        return equal(subject.logits(), subject.plain)


def learned(subject: Subject) -> Finding:
    """Far from fresh; or nothing else here would show anything of them."""
    with subject.patched(subject.aligned):
        subject.stir()
        found = subject.logits()
    change, least = largest(subject.of_real(found - subject.plain)), bar_for(subject, subject.plain, 0.0)
    return Finding(change > least, note=f"largest change of a logit {change:.3g}; rounding makes up to {least:.3g}")


def trained(subject: Subject) -> Finding:
    """What asks for gradients, and what gets some. They are computed beside the parameters, which stay as they are."""
    with torch.enable_grad(), subject.patched(subject.aligned) as model:
        steering = steering_of(model)
        own = {id(parameter) for part in (steering, *steering.plan.projectors) for parameter in part.parameters()}
        loss = logits_in(model(**subject.inputs)).float().square().mean()
        asking = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_base = [name for name, parameter in asking if id(parameter) not in own]
        wanted = [parameter for _, parameter in asking if id(parameter) in own]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted and loss.requires_grad else ()
    if of_base:
        return Finding(False, note=f"{len(of_base)} parameters of the base model are trained, {of_base[0]} among them")
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in found)
    return Finding(reached > 0, note=f"{reached} of {len(wanted)} parameters of the steering get gradients while it is fresh")
