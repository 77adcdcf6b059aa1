"""Rewrite the mixture-of-experts blocks of a dynamo-level graph, in place.

Before: the nodes of an experts module (sort, grouped_mm, gelu, mul, grouped_mm, index, sum, ...; or
bmm's on gathered weights).
After:  packed weights as attributes of the graph module, and one fp4moe.nvfp4_moe.
Kept: routing, placeholders, size nodes that others use. Not handled: graphs whose weights are not
real tensors, training.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    HIDDEN_ALIGNMENTS,
    MoeSpec,
    check_kernel_name,
    current_capability,
    select_kernel,
)
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.stamps import is_experts_class

from .locate import Region, find_regions, meta_value
from .packing import PackedExperts, pack_once
from .report import BlockMatch, RewriteReport
from .verify import Hypothesis, trust_region, verify_region

__all__ = ["Rewritten", "rewrite_moe", "rewrite_moe_with_weights"]

logger = logging.getLogger("fp4moe")
OPERATOR = torch.ops.fp4moe.nvfp4_moe.default
FUSED_OPERATORS = (OPERATOR, torch.ops.fp4moe.nvfp4_moe_from_logits.default)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A rewritten block and the nodes of its float weights."""

    path: str
    packed: PackedExperts
    weight_nodes: tuple[fx.Node, fx.Node]


def rewrite_moe(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    kernel: str = "auto",
    verify: bool = True,
    *,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
) -> RewriteReport:
    """Replace each mixture-of-experts block by one operator on packed weights.

    Args:
        graph_module: a graph as torch.compile gives it to a backend; changed in place.
        example_inputs: the values of its placeholders; expert weights must be real tensors.
        kernel: "auto" or a kernel's name, see `fp4moe.why_not`.
        verify: compare each distinct block's numbers with the definition. False trusts the module's
            names: gate first, concatenated, the activation of its `act_fn`.
        hidden_alignment: 128, 256 or 512, what the Blackwell kernel pads the hidden size to.

    Returns:
        What was rewritten, and what was not with its reason. A block that does not fit stays as it
        is.

    Raises:
        UnsupportedError: no such kernel, or the kernel asked for by name cannot run a block; the
            graph is as it was.
    """
    return rewrite_moe_with_weights(graph_module, example_inputs, kernel, verify, hidden_alignment)[
        0
    ]


def rewrite_moe_with_weights(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    kernel: str,
    verify: bool,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
) -> tuple[RewriteReport, list[Rewritten]]:
    """As `rewrite_moe`, also returning what was packed."""
    check_kernel_name(kernel, caller="rewrite_moe")
    if hidden_alignment not in HIDDEN_ALIGNMENTS:
        raise UnsupportedError(
            f"rewrite_moe: hidden_alignment must be one of {HIDDEN_ALIGNMENTS}; got "
            f"{hidden_alignment!r}. Pass one of these."
        )
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, example_inputs, strict=True))
    already = sum(node.target in FUSED_OPERATORS for node in gm.graph.nodes)
    verified: dict[str, tuple[Hypothesis | None, str]] = {}
    # Everything is decided before the graph changes, so that an error leaves it as it was.
    plans = []
    for region in find_regions(gm.graph, is_experts_class):
        form: Hypothesis | None = None
        name: str | None = None
        first: Any = None
        down: Any = None
        reasons = list(region.reasons)
        if not reasons:
            first, down = (_real_weight(gm, values, node) for node in (region.first, region.down))
            reasons += _weight_reasons(first, down)
        if not reasons:
            key = _structure(region)
            if key not in verified:
                verified[key] = verify_region(gm, region) if verify else trust_region(region)
            form, why = verified[key]
            reasons += [why] if why else []
        if form and not reasons:
            name, why = _kernel(kernel, region, form, first)
            reasons += [why] if why else []
        packed = None
        if form and name and not reasons:
            try:
                packed = pack_once(first, down, form, name, hidden_alignment)
            except ShapeError as error:
                reasons.append(str(error))
        plans.append((region, form, packed, reasons))
    blocks = tuple(
        BlockMatch(
            path=region.path,
            module=region.module_class,
            rewritten=packed is not None,
            form=str(form) if form else None,
            kernel=packed.kernel if packed else None,
            reasons=tuple(reasons),
        )
        for region, form, packed, reasons in plans
    )
    done: list[Rewritten] = []
    # From the last one: a region may read the output of an earlier one.
    for region, _, packed, _ in reversed(plans):
        if packed is not None:
            _insert(gm, region, packed)
            assert region.first and region.down
            done.insert(0, Rewritten(region.path, packed, (region.first, region.down)))
    if done:
        gm.graph.lint()
        gm.recompile()
    return RewriteReport(blocks, already), done


def _real_weight(gm: fx.GraphModule, values: dict[fx.Node, Any], node: fx.Node | None) -> Any:
    assert node is not None
    if node.op == "get_attr" and isinstance(node.target, str):
        return (
            gm.get_parameter(node.target)
            if node.target in dict(gm.named_parameters())
            else gm.get_buffer(node.target)
        )
    return values.get(node)


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
    names = {node: f"%{i}" for i, node in enumerate([*region.inputs().values(), *region.nodes])}

    def plain(argument: fx.Node) -> Any:
        return names.get(argument, str(meta_value(argument)))

    lines = [
        f"{role} {meta_value(n).dtype}{list(meta_value(n).shape)}"
        for role, n in region.inputs().items()
    ]
    for node in region.nodes:
        args, kwargs = fx.node.map_arg(node.args, plain), fx.node.map_arg(node.kwargs, plain)
        lines.append(f"{names[node]} {node.op} {node.target} {args} {kwargs}")
    return "\n".join(lines)


def _kernel(
    kernel: str, region: Region, form: Hypothesis, first: torch.Tensor
) -> tuple[str | None, str]:
    assert region.hidden and region.expert_ids and region.first and region.down
    rows = first.shape[2] if form.transposed else first.shape[1]
    spec = MoeSpec(
        activation=form.activation,
        gated=form.gated,
        hidden_size=int(meta_value(region.hidden).shape[1]),
        intermediate_size=rows // (1 + form.gated),
        num_experts=first.shape[0],
        top_k=int(meta_value(region.expert_ids).shape[1]),
        capability=current_capability(first.device),
    )
    try:
        return select_kernel(kernel, spec, caller="rewrite_moe"), ""
    except UnsupportedError as error:
        # A kernel asked for by name is an order, not a preference.
        if kernel != "auto":
            raise
        return None, str(error)


def _insert(gm: fx.GraphModule, region: Region, packed: PackedExperts) -> None:
    assert region.output is not None and region.hidden is not None
    output, graph = region.output, gm.graph
    fake_mode = getattr(meta_value(region.hidden), "fake_mode", None)
    stack = output.meta.get("nn_module_stack")
    with graph.inserting_before(output):
        attributes = []
        for name, tensor in packed.weights.operands._asdict().items():
            attribute = f"{packed.name}_{name}"
            if not hasattr(gm, attribute):
                gm.register_buffer(attribute, tensor, persistent=False)
                # AOTAutograd asks where each attribute of a dynamo graph comes from.
                sources = getattr(gm, "_param_name_to_source", None)
                if sources is not None:
                    sources[attribute] = torch._dynamo.source.ConstantSource(attribute)
            node = graph.get_attr(attribute)
            # Static: the shape environment would otherwise make a symbol of each size.
            node.meta["example_value"] = (
                fake_mode.from_tensor(tensor, static_shapes=True) if fake_mode else tensor
            )
            node.meta["nn_module_stack"] = stack
            attributes.append(node)
        settings = nvfp4_moe_arguments(packed.weights, packed.kernel)[len(attributes) :]
        fused = graph.call_function(
            OPERATOR,
            (region.hidden, region.expert_ids, region.routing_weights, *attributes, *settings),
        )
        hidden = meta_value(region.hidden)
        fused.meta.update(
            {
                k: v
                for k, v in output.meta.items()
                if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
            }
        )
        fused.meta["example_value"] = meta_value(output)
        result = fused
        if meta_value(output).dtype != hidden.dtype:
            result = graph.call_method("to", (fused, meta_value(output).dtype))
            result.meta.update(fused.meta)
    output.replace_all_uses_with(result)
    # Dead code elimination would keep in-place nodes such as setitem.
    for node in reversed(region.nodes):
        if not node.users:
            graph.erase_node(node)
