"""Decide about each block of a graph, before anything is changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import MoeSpec, current_capability, select_kernel
from fp4moe.stamps import is_experts_class

from .dataflow import Flow, hinted_shape, meta_value
from .hypotheses import Hypothesis
from .insert import output_sizes
from .locate import Region, find_regions
from .packing import PackedExperts, pack_once
from .regions import propose_regions
from .report import BlockMatch
from .verify import Verdict, judge_region, trust_region

__all__ = ["Plan", "Planner"]

logger = logging.getLogger("fp4moe")


@dataclasses.dataclass
class Plan:
    """What was decided about one block."""

    region: Region
    verdict: Verdict
    reasons: list[str]
    packed: PackedExperts | None = None

    def match(self) -> BlockMatch:
        """Return its line of the report."""
        return BlockMatch(
            path=self.region.path,
            module=self.region.module_class,
            rewritten=self.packed is not None,
            form=str(self.verdict.form) if self.verdict.form else None,
            kernel=self.packed.kernel if self.packed else None,
            reasons=tuple(self.reasons),
        )


class Planner:
    """Decides what happens to each block; each distinct structure is verified once."""

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        kernel: str,
        verify: bool,
        hidden_alignment: int,
    ):
        self.gm, self.kernel, self.verify, self.alignment = gm, kernel, verify, hidden_alignment
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.values = dict(zip(placeholders, example_inputs, strict=True))
        self.verdicts: dict[str, Verdict] = {}

    def plans(self) -> list[Plan]:
        """The blocks that say their name, then those that only their data flow shows."""
        found = [
            self._plan(region, trusted=not self.verify)
            for region in find_regions(self.gm.graph, is_experts_class)
        ]
        taken = {node for plan in found for node in plan.region.nodes}
        flow = Flow(self.gm.graph)
        for regions in propose_regions(flow, self._parameters(), taken):
            plan = self._first_that_fits(regions)
            found += [plan] if plan else []
            if plan and plan.verdict.form:
                # Two blocks may share a table of indices.
                taken.update(node for node in plan.region.nodes if not flow.is_constant(node))
        place = flow.index
        return sorted(found, key=lambda p: place[p.region.nodes[-1]] if p.region.nodes else 0)

    def _first_that_fits(self, regions: Iterator[Region]) -> Plan | None:
        tried: list[Plan] = []
        for region in regions:
            plan = self._plan(region, trusted=False)
            if plan.verdict.form is not None:
                return plan
            tried.append(plan)
            logger.debug("rewrite_moe: %s: %s", region.path, "; ".join(plan.reasons))
        return min(tried, key=lambda plan: plan.verdict.error, default=None)

    def _plan(self, region: Region, trusted: bool) -> Plan:
        reasons = list(region.reasons)
        unknown = Plan(region, Verdict(None, ""), reasons)
        if not region.weights:
            return unknown
        weights = {r: tuple(map(self._real, nodes)) for r, nodes in region.weights.items()}
        if region.reasons and not region.by_flow:
            return unknown
        if not reasons:
            reasons += _weight_reasons(*(w for group in weights.values() for w in group))
        if reasons and not region.by_flow:
            return unknown
        verdict = self._verdict(region, trusted)
        plan = Plan(region, verdict, reasons)
        if verdict.reason:
            reasons.append(verdict.reason)
        if region.extras:
            names = ", ".join(f"{n.name} {list(meta_value(n).shape)}" for n in region.extras)
            reasons.append(f"it reads {names} besides its weights; a bias or a scale?")
        if output_sizes(region) is None:
            reasons.append("the sizes of its output do not come from its input")
        if verdict.form is None or reasons:
            return plan
        name, why = self._kernel(region, verdict.form, weights["first"][0])
        reasons += [why] if why else []
        if name and not reasons:
            try:
                plan.packed = pack_once(weights, verdict.form, name, self.alignment)
            except ShapeError as error:
                reasons.append(str(error))
        return plan

    def _verdict(self, region: Region, trusted: bool) -> Verdict:
        key = _structure(region)
        if key not in self.verdicts:
            self.verdicts[key] = (
                Verdict(*trust_region(region)) if trusted else judge_region(self.gm, region)
            )
        return self.verdicts[key]

    def _parameters(self) -> set[fx.Node]:
        """Nodes that are stored weights, whatever their shape."""
        return {
            node
            for node in self.gm.graph.nodes
            if node.op == "get_attr"
            or isinstance(self.values.get(node), torch.nn.Parameter)
            or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        }

    def _real(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.gm.get_submodule(owner), name)
        return self.values.get(node)

    def _kernel(
        self, region: Region, form: Hypothesis, first: torch.Tensor
    ) -> tuple[str | None, str]:
        assert region.hidden is not None and region.expert_ids is not None
        experts, rows, columns = region.weight_shape("first")
        joint = form.gated and "second" not in region.weights
        spec = MoeSpec(
            activation=form.activation,
            gated=form.gated,
            hidden_size=int(meta_value(region.hidden).shape[-1]),
            intermediate_size=(columns if form.transposed else rows) // (1 + joint),
            num_experts=experts,
            top_k=int(meta_value(region.expert_ids).shape[-1]),
            capability=current_capability(first.device),
        )
        try:
            return select_kernel(self.kernel, spec, caller="rewrite_moe"), ""
        except UnsupportedError as error:
            # A kernel asked for by name is an order, not a preference.
            if self.kernel != "auto":
                raise
            return None, str(error)


def _weight_reasons(*weights: Any) -> list[str]:
    for weight in weights:
        if not isinstance(weight, torch.Tensor) or isinstance(weight, torch._subclasses.FakeTensor):
            return [
                "its weights are computed in the graph or are not real tensors; only stored "
                "weights can be packed"
            ]
        if type(weight.data) is not torch.Tensor:
            return [f"its weights are {type(weight.data).__name__}, not plain tensors"]
        if torch.is_grad_enabled() and weight.requires_grad:
            return [
                "its weights require gradients; compile under torch.no_grad() or call "
                "model.requires_grad_(False)"
            ]
    return []


def _structure(region: Region) -> str:
    """A text that is equal for regions of equal operations and sizes."""
    inputs = region.inputs()
    names = {node: f"%{i}" for i, node in enumerate([*inputs.values(), *region.nodes])}

    def plain(argument: fx.Node) -> Any:
        return names.get(argument, str(meta_value(argument)))

    lines = [f"{role} {meta_value(n).dtype}{hinted_shape(n)}" for role, n in inputs.items()]
    for node in [*region.nodes, *region.support]:
        args, kwargs = fx.node.map_arg(node.args, plain), fx.node.map_arg(node.kwargs, plain)
        lines.append(f"{names.get(node)} {node.op} {node.target} {args} {kwargs}")
    lines.append(f"-> {names.get(region.output) if region.output else None}")
    return "\n".join(lines)
