"""Rewrite the mixture-of-experts blocks of a captured graph, in place.

Before: the nodes of a block, however it is written (sort and grouped_mm, bmm on gathered weights, a
loop over experts, ...).
After:  one fp4moe.float_moe on the same float weights, whose packed ones it finds when it runs; in
a program that owns its weights, packed ones as attributes and one fp4moe.nvfp4_moe, or fp4moe.moe
where there are biases or the format is another.
Kept: routing unless asked, placeholders, size nodes that others use. Not handled: weights that are
computed in the graph, training.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fp4moe.formats import DEFAULT_FORMAT
from fp4moe.kernels import DEFAULT_HIDDEN_ALIGNMENT

from .find.symbolic import has_shapes, in_original, with_shapes
from .graph.subgraphs import subgraph_calls
from .insert import FUSED_OPERATORS, insert_operator
from .plan import Planner
from .report import RewriteReport, report_no_match
from .routing.fuse import fuse_routing
from .settings import RewriteSettings

__all__ = ["Rewritten", "rewrite_graph", "rewrite_moe"]

logger = logging.getLogger("fp4moe")


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A rewritten block and the nodes of its float weights."""

    path: str
    weight_nodes: tuple[fx.Node, ...]


def rewrite_moe(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    kernel: str = "auto",
    verify: bool = True,
    *,
    format: str = DEFAULT_FORMAT,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
    on_no_match: str = "ignore",
) -> RewriteReport:
    """Replace each mixture-of-experts block by one operator on packed weights.

    The operator takes the float weights of the graph and looks the packed ones up, so that the
    graph follows them; for a program that owns its weights see `rewrite_exported`.

    Args:
        graph_module: a graph of torch.compile, torch.export or torch.fx.symbolic_trace; changed in
            place, with the graphs of its higher-order operators.
        example_inputs: the values of its placeholders.
        kernel: "auto" or a kernel's name, see `fp4moe.why_not`.
        verify: each distinct block's numbers are compared with the definition on random inputs.
            False leaves out the further comparisons: on large inputs whose tokens all choose the
            same experts, and on the experts that no token chose. A block that clamps large values,
            drops tokens over a capacity or treats one expert apart is then rewritten all the same.
        format: what the weights are quantised to, a name of `fp4moe.formats.FORMATS`.
        hidden_alignment: 128, 256 or 512, what the Blackwell kernel pads the hidden size to.
        routing: "given" keeps the graph's own routing; "fused" lets the kernel choose the experts
            where the graph's routing is a method of the kernel's; the report says where not.
        on_no_match: "ignore", "warn" or "error" when the graph has no block that is or was fused.

    Returns:
        What was rewritten, and what was not with its reason. A block that does not fit stays as it
        is.

    Raises:
        UnsupportedError: a value that is none of its choices, the kernel asked for by name cannot
            run a block, or no block with on_no_match="error"; the graph is as it was.
    """
    settings = RewriteSettings(kernel, verify, hidden_alignment, routing, format)
    settings.checked(on_no_match, caller="rewrite_moe")
    report, _ = rewrite_graph(graph_module, example_inputs, settings)
    logger.info("rewrite_moe: %s", report)
    report_no_match(report, on_no_match, caller="rewrite_moe")
    return report


def rewrite_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: RewriteSettings,
    *,
    constants: bool = False,
) -> tuple[RewriteReport, list[Rewritten]]:
    """As `rewrite_moe` with checked settings; also returns what was rewritten.

    Args:
        constants: the graph is to own its packed weights, which become attributes.
    """
    origin: dict[fx.Node, fx.Node] | None = None
    searched = gm
    if not has_shapes(gm):
        searched, origin = with_shapes(gm, example_inputs)
    already = sum(node.target in FUSED_OPERATORS for node in gm.graph.nodes)
    # Everything is decided before the graph changes, so that an error leaves it as it was.
    # Compilers may call under their fake mode, where no number can be asked and nothing packed.
    with unset_fake_temporarily():
        plans = Planner(searched, example_inputs, settings, constants).plans()
    done: list[Rewritten] = []
    # From the last one: a region may read the output of an earlier one.
    for plan in reversed(plans):
        if plan.stored is not None and plan.verdict.form is not None:
            region = plan.region if origin is None else in_original(plan.region, origin)
            weighting = plan.verdict.form.weighting
            insert_operator(gm, region, plan.stored, weighting, plan.constants)
            done.insert(0, Rewritten(region.path, region.weight_nodes()))
    if origin is not None:
        # The shapes are those of one example, and half a graph of them would look like all.
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
    if done:
        gm.graph.lint()
        gm.recompile()
    matches = fuse_routing(gm, example_inputs, rewrite=settings.routing == "fused")
    report = RewriteReport(tuple(plan.match() for plan in plans), already, matches)
    if not constants:
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        seen: set[fx.GraphModule] = set()
        for call in subgraph_calls(gm):
            if call.graph_module not in seen:
                seen.add(call.graph_module)
                inner = [values.get(operand) for operand in call.operands]
                found, _done = rewrite_graph(call.graph_module, inner, settings)
                report = report.with_subgraph(found)
    return report, done
