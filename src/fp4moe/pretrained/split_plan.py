"""Whether the modules of a checkpoint's plan can be split as transformers wants, before loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..checkpoint.plan import ExpertsPlan, LinearPlan
from ..errors import refuse
from ..kernels import Layer, choose_kernel, current_capability
from ..models.sharding import Sharding
from ..part import EXPERTS, Part
from .placeholder import Options

__all__ = ["check_linears", "experts_part", "experts_reasons"]


def experts_reasons(
    sharding: Sharding | None, path: str, names: list[str], experts: ExpertsPlan, options: Options
) -> list[str]:
    """Return why experts cannot be packed, or not split; names: of their weights in the model.

    What any device would be asked to run: the device itself is known later.

    Raises:
        ShapeError: their sizes do not divide.
    """
    facts, form = experts.facts, _form(experts)
    parts: list[Part | None] = [None]
    if sharding is not None:
        if reasons := sharding.reasons(path, names):
            return reasons
        parts = sharding.parts(path, facts, form, caller="from_pretrained")
    sizes = {_sizes(facts, part) for part in parts}
    for num_experts, intermediate_size in sorted(sizes):
        here = {"num_experts": num_experts, "intermediate_size": intermediate_size}
        fused = options.routing == "fused"
        layer = Layer.of(facts, format=form, kernel_routes=fused, **here)
        if reasons := choose_kernel(options.kernel, layer, current_capability())[1]:
            return reasons
    return []


def experts_part(sharding: Sharding | None, path: str, experts: ExpertsPlan) -> Part | None:
    """Return the part of experts that this process holds, None for all."""
    if sharding is None:
        return None
    return sharding.part(path, experts.facts, _form(experts), caller="from_pretrained")


def check_linears(
    sharding: Sharding, linears: Mapping[str, LinearPlan], own_forward: Collection[str]
) -> None:
    """Refuse quantised Linears that cannot be split as transformers' plan wants it.

    own_forward: paths of those whose class computes something else.
    """
    refused: dict[str, str] = {}
    for path, linear in linears.items():
        part, why = sharding.linear_part(path, linear.facts, linear.form, 0)
        if part is not None and path in own_forward:
            why = "its class does not multiply as a Linear does"
        if why:
            refused[path] = why
    if refused:
        listed = ". ".join(f"{path}: {why}" for path, why in [*refused.items()][:10])
        what = f"{len(refused)} quantised Linears cannot be split"
        advice = "Pass another tp_size, or a tp_plan without them."
        refuse("from_pretrained", what, listed, advice)


def _form(experts: ExpertsPlan) -> str:
    """The format that experts have in the end."""
    return experts.facts.format if experts.form == "float" else experts.form


def _sizes(facts, part: Part | None) -> tuple[int, int]:
    """Experts and intermediate size of a part."""
    if part is None:
        return facts.num_experts, facts.intermediate_size
    if part.kind == EXPERTS:
        return part.size, facts.intermediate_size
    return facts.num_experts, part.size
