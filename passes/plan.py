"""Decide about each block of a graph, before anything is changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.identity.float_weights import FloatWeights, StoredForm, pack_float
from fp4moe.identity.table import find_packed
from fp4moe.kernels import (
    DIFFERENTIABLE,
    Layer,
    PreparedWeights,
    current_capability,
    get_kernel,
    select_kernel,
)

from .find.by_flow import propose_regions
from .find.region import Region
from .graph.attributes import read_attribute
from .graph.dataflow import Flow, meta_value, structure
from .insert import FUSED_OPERATORS, output_sizes
from .judge.forms import Form
from .judge.verify import Verdict, judge_region
from .report import BlockMatch
from .settings import RewriteSettings

__all__ = ["BlockPlan", "Planner"]

logger = logging.getLogger("fp4moe")


@dataclasses.dataclass
class BlockPlan:
    """What was decided about one block.

    Attributes:
        stored: what its weights mean and are packed into; None where it is left, with reasons.
        constants: the packed weights, where the graph is to own them.
    """

    region: Region
    verdict: Verdict
    reasons: list[str]
    stored: StoredForm | None = None
    constants: PreparedWeights | None = None

    def match(self) -> BlockMatch:
        """Return its line of the report."""
        return BlockMatch(
            path=self.region.path,
            module=self.region.module_class,
            rewritten=self.stored is not None,
            form=str(self.verdict.form) if self.verdict.form else None,
            format=self.stored.format if self.stored else None,
            kernel=self.stored.kernel if self.stored else None,
            reasons=tuple(self.reasons),
        )


# What each distinct structure computes; the functions it calls are part of the key.
_verdicts: dict[tuple, Verdict] = {}


class Planner:
    """Decides what happens to each block; each distinct structure is verified once.

    Args:
        gm: the graph. example_inputs: the values of its placeholders, None where computed.
        settings: of `rewrite_moe`.
        constants: whether the graph is to own its packed weights.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        settings: RewriteSettings,
        constants: bool,
    ):
        self.gm, self.settings, self.constants = gm, settings, constants
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.values = dict(zip(placeholders, example_inputs, strict=True))
        self.verdicts: dict[tuple, Verdict] = {}
        self.packed: dict[tuple, PreparedWeights] = {}

    def plans(self) -> list[BlockPlan]:
        """Return what was decided about each block, in graph order."""
        plans: list[BlockPlan] = []
        taken: set[fx.Node] = set()
        flow = Flow(self.gm.graph)
        for regions in propose_regions(flow, self._parameters(), taken):
            plan = self._first_that_fits(regions)
            plans += [plan] if plan else []
            if plan and plan.verdict.form:
                # Two blocks may share a table of indices.
                taken.update(node for node in plan.region.nodes if not flow.is_constant(node))
        return sorted(plans, key=lambda plan: flow.index[plan.region.nodes[-1]])

    def _first_that_fits(self, regions: Iterator[Region]) -> BlockPlan | None:
        """Return the plan of the first region with a form, else of the one that comes closest."""
        tried: list[BlockPlan] = []
        for region in regions:
            # An earlier run has been here.
            if any(node.target in FUSED_OPERATORS for node in region.nodes):
                continue
            plan = self._plan(region)
            if plan.verdict.form is not None:
                return plan
            tried.append(plan)
            logger.debug("rewrite_moe: %s: %s", region.path, "; ".join(plan.reasons))
        return min(tried, key=lambda plan: plan.verdict.error, default=None)

    def _plan(self, region: Region) -> BlockPlan:
        """Return what the region computes and what it is packed into, or why it stays."""
        plan = BlockPlan(region, Verdict(None, ""), list(region.reasons))
        if not region.weights:
            return plan
        weights = {r: tuple(map(self._real, nodes)) for r, nodes in region.weights.items()}
        floats = FloatWeights(**{"second": (), **weights})
        if not plan.reasons:
            plan.reasons += _weight_reasons(floats.flat(), real=self.constants)
        plan.verdict = self._verdict(region)
        plan.reasons += _form_reasons(region, plan.verdict)
        form = plan.verdict.form
        if form is None or plan.reasons:
            return plan
        kernel, why = self._kernel(region, form, floats.first[0])
        plan.reasons += [why] if kernel is None else _gradient_reasons(region, kernel)
        if kernel is None or plan.reasons:
            return plan
        stored = form.stored(kernel, self.settings.hidden_alignment, self.settings.format)
        try:
            if self.constants:
                plan.constants = self._packed(floats, stored)
            elif not any(isinstance(weight, FakeTensor) for weight in floats.flat()):
                # Ahead of the first call, so that it can be inside a capture.
                find_packed(floats, stored, caller="rewrite_moe", thorough=True)
            plan.stored = stored
        except ShapeError as error:
            plan.reasons.append(str(error))
        return plan

    def _packed(self, floats: FloatWeights, stored: StoredForm) -> PreparedWeights:
        """Packed weights of the graph's own: the table's follow the floats, constants must not."""
        key = (tuple(map(id, floats.flat())), stored)
        if key not in self.packed:
            quantized = pack_float(floats, stored)
            kernel = get_kernel(stored.kernel)
            self.packed[key] = kernel.prepare(quantized, hidden_alignment=stored.hidden_alignment)
        return self.packed[key]

    def _verdict(self, region: Region) -> Verdict:
        nodes = [*region.nodes, *region.support]
        if any(node.op in ("get_attr", "call_module") for node in nodes):
            # What it computes hangs on values that its structure does not show.
            known, owner = self.verdicts, id(self.gm)
        else:
            known, owner = _verdicts, 0
        functions = tuple(node.target for node in nodes)
        key = (
            owner,
            self.settings.verify,
            _structure(region),
            functions,
            tuple(ACTIVATIONS.items()),
        )
        if key not in known:
            known[key] = judge_region(self.gm, region, self.settings.verify)
        return known[key]

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
            return read_attribute(self.gm, node)
        return self.values.get(node)

    def _kernel(self, region: Region, form: Form, first: torch.Tensor) -> tuple[str | None, str]:
        assert region.hidden is not None and region.expert_ids is not None
        experts, rows, columns = region.weight_shape("first")
        joint = form.gated and "second" not in region.weights
        layer = Layer.of(
            form,
            format=self.settings.format,
            hidden_size=int(meta_value(region.hidden).shape[-1]),
            intermediate_size=(columns if form.transposed else rows) // (1 + joint),
            num_experts=experts,
            top_k=int(meta_value(region.expert_ids).shape[-1]),
            kernel_routes=self.settings.routing == "fused",
        )
        capability = current_capability(first.device)
        try:
            return select_kernel(self.settings.kernel, layer, capability, caller="rewrite_moe"), ""
        except UnsupportedError as error:
            # A kernel asked for by name is an order, not a preference.
            if self.settings.kernel != "auto":
                raise
            return None, str(error)


def _weight_reasons(weights: Sequence[Any], real: bool) -> list[str]:
    for weight in weights:
        fake = isinstance(weight, FakeTensor)
        if not isinstance(weight, torch.Tensor) or (fake and real):
            return [
                "its weights are computed in the graph or are not real tensors; only stored "
                "weights can be packed"
            ]
        if not fake and type(weight.data) is not torch.Tensor:
            return [f"its weights are {type(weight.data).__name__}, not plain tensors"]
        if torch.is_grad_enabled() and weight.requires_grad:
            return [
                "its weights require gradients; compile under torch.no_grad() or call "
                "model.requires_grad_(False)"
            ]
    return []


def _form_reasons(region: Region, verdict: Verdict) -> list[str]:
    """Why what it computes is not what the operator computes."""
    reasons = []
    if verdict.form is None and region.computed_weights:
        names = ", ".join(node.name for node in region.computed_weights)
        reasons.append(
            f"its weights are computed in the graph ({names}); only stored weights can be packed"
        )
    if region.extras:
        names = ", ".join(f"{n.name} {list(meta_value(n).shape)}" for n in region.extras)
        reasons.append(f"it reads {names} besides its weights; a bias or a scale?")
    if verdict.reason:
        reasons.append(verdict.reason)
    if output_sizes(region) is None:
        reasons.append("the sizes of its output do not come from its input")
    reasons += _bias_reasons(region)
    return reasons


def _bias_reasons(region: Region) -> list[str]:
    """Why its biases are not those of the operator, which has all or none."""
    matrices = [role for role in region.weights if role not in region.biases]
    without = [role for role in matrices if f"{role}_bias" not in region.biases]
    dtypes = {meta_value(node).dtype for node in region.weight_nodes()}
    reasons = []
    if region.biases and without:
        names = ", ".join(f"{n.name}" for role in without for n in region.weights[role][:1])
        reasons.append(f"it has biases, but none behind {names}; the operator takes all or none")
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"its weights and biases have several dtypes, {names}; cast them to one")
    return reasons


def _gradient_reasons(region: Region, kernel: str) -> list[str]:
    """Why training forbids it: not every kernel gives its inputs a gradient."""
    inputs = {"hidden states": region.hidden, "routing weights": region.routing_weights}
    needing = [
        name
        for name, node in inputs.items()
        if node is not None and getattr(meta_value(node), "requires_grad", False)
    ]
    if not torch.is_grad_enabled() or not needing or get_kernel(kernel).differentiable:
        return []
    return [
        f"its {' and '.join(needing)} need a gradient, which kernel {kernel} does not give; ask "
        f"for {' or '.join(DIFFERENTIABLE)}, or compile under torch.no_grad()"
    ]


def _structure(region: Region) -> str:
    """A text that is equal for regions of equal operations and sizes."""
    nodes = [*region.nodes, *region.support]
    outputs = [region.output] if region.output is not None else []
    return structure(region.inputs(), nodes, outputs)
