"""Name the routing in front of each fused operator and, on request, hand it to the kernel.

Before: logits [T, E] -> softmax or sigmoid, top-k, sum, div, ... -> float_moe, moe or nvfp4_moe; or
        choose_experts instead, where a model's routers are fused.
After:  logits [T, E] -> float_moe_from_logits, moe_from_logits or nvfp4_moe_from_logits. A factor
per expert (Gemma4) goes with the float weights, or into the global scales and the bias of the
packed down projection. In a format without global scales choose_experts takes it, in one launch
before the operator.
Structure proposes (slice.py), numbers decide (forms.py). Not handled: logits that
are not [T, E], methods without renormalisation, factors that NVFP4 would need stored and are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fp4moe.arguments import (
    FloatMoeArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeFromLogitsArguments,
    Settings,
    lacks_biases,
)
from fp4moe.formats import FORMATS
from fp4moe.identity.float_weights import FloatWeights
from fp4moe.kernels import Layer, get_kernel

from ..find.region import innermost_module
from ..find.symbolic import has_shapes
from ..graph.attributes import add_attribute, insert_nothing, read_attribute
from ..graph.dataflow import Flow, meta_value
from ..report import RoutingMatch
from .forms import RoutingForm, recognise_routing
from .slice import RoutingSlice, cut_routing

__all__ = ["fuse_routing"]

logger = logging.getLogger("fp4moe")
GIVEN = (torch.ops.fp4moe.nvfp4_moe.default, torch.ops.fp4moe.moe.default)
FLOAT = torch.ops.fp4moe.float_moe.default
FLOAT_FROM_LOGITS = torch.ops.fp4moe.float_moe_from_logits.default
# What a factor per expert multiplies in packed weights.
SCALED = ("down_global_scale", "down_bias")
NO_SHAPES = "the graph carries no shapes; capture it with torch.compile or torch.export"


def fuse_routing(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, rewrite: bool = True
) -> tuple[RoutingMatch, ...]:
    """Name the routing of each fused operator in a graph and hand it to the kernel, in place.

    Args:
        graph_module: a dynamo-level or ATen graph, after `rewrite_moe` or of a replaced model.
        example_inputs: the values of its placeholders; a factor per expert that goes into packed
            weights must be a real tensor.
        rewrite: False only names.

    Returns one RoutingMatch for each operator in graph order; what cannot be fused stays, with the
    reason.
    """
    gm = graph_module
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, example_inputs, strict=True))
    known: dict[str, tuple[RoutingForm | None, str]] = {}
    flow = Flow(gm.graph)
    shapes = has_shapes(gm)
    matches, plans = [], []
    for operator in [node for node in gm.graph.nodes if node.target in (*GIVEN, FLOAT)]:
        found, form, why = _name(gm, flow, operator, known) if shapes else (None, None, NO_SHAPES)
        factors, note = None, ""
        if found is not None and form is not None and not why:
            note = _choose_reason(operator, form)
            if not note:
                factors, why = _scaled_down(gm, values, operator, found, form)
                why = why or _kernel_reason(operator, form)
        if found is not None and form is not None and rewrite and not why:
            plans.append((operator, found, form, factors, bool(note)))
        reasons = tuple(filter(None, (why, note)))
        fused = rewrite and not why
        path, _module = innermost_module(operator)
        matches.append(RoutingMatch(path, str(form) if form else None, fused, reasons))
    for operator, found, form, factors, before in plans:
        if before:
            _insert_choice(gm, flow, operator, found, form)
        else:
            _insert(gm, flow, operator, found, form, factors)
    if plans:
        gm.graph.lint()
        gm.recompile()
    for match in matches if rewrite else ():
        if not match.fused:
            why = "; ".join(match.reasons)
            logger.warning("fuse_routing: %s keeps its routing: %s", match.path, why)
    return tuple(matches)


def _name(
    gm: fx.GraphModule,
    flow: Flow,
    operator: fx.Node,
    known: dict[str, tuple[RoutingForm | None, str]],
) -> tuple[RoutingSlice | None, RoutingForm | None, str]:
    """Return (slice, form, "" or why it cannot be fused) for the longest slice that fits a form."""
    found, why = cut_routing(gm, flow, operator, _layer_of(operator)[0].num_experts)
    for each in found:
        key = each.structure()
        if key not in known:
            known[key] = recognise_routing(each)
        form, reason = known[key]
        if form is not None:
            return each, form, reason
        # The reason of the longest slice: the shorter ones are parts of it.
        why = reason if each is found[0] else why
    return None, None, why


def _choose_reason(operator: fx.Node, form: RoutingForm) -> str:
    """Why choose_experts has to choose before the operator; "" where the kernel may."""
    format = _layer_of(operator)[0].format
    if form.output_scale is None or FORMATS[format].globally_scaled:
        return ""
    return f"{format} has no global scale into which its factor per expert could go"


def _scaled_down(
    gm: fx.GraphModule,
    values: dict[fx.Node, Any],
    operator: fx.Node,
    found: RoutingSlice,
    form: RoutingForm,
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Return (operands times the factor per expert or None, why they cannot be computed)."""
    if form.output_scale is None:
        return None, ""
    if operator.target is FLOAT:
        return None, _factor_reason(values, found.vectors[form.output_scale])
    given = MoeArguments.read(operator.args)
    node = found.vectors[form.output_scale]
    scaled = {name: getattr(given.operands, name) for name in SCALED}
    tensors = {name: _stored(gm, values, n) for name, n in scaled.items() if n is not None}
    scale = _stored(gm, values, node)
    for tensor in (*tensors.values(), scale):
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return None, f"its factor per expert {node.name} is not a stored tensor"
    if torch.is_grad_enabled() and scale.requires_grad:
        return None, f"its factor per expert {node.name} requires gradients"
    first, count = given.settings.expert_offset, tensors["down_global_scale"].shape[0]
    with torch.no_grad(), unset_fake_temporarily():
        # As Kernel.prepare: with every kernel these operands multiply an expert's output.
        factor = scale.detach().float()[first : first + count]
        return {n: t * factor.view(-1, *[1] * (t.ndim - 1)) for n, t in tensors.items()}, ""


def _factor_reason(values: dict[fx.Node, Any], node: fx.Node) -> str:
    """Why a factor per expert cannot go with the float weights; "" where it can."""
    if node.op not in ("placeholder", "get_attr"):
        return f"its factor per expert {node.name} is not a stored tensor"
    tensor = values.get(node, meta_value(node))
    if torch.is_grad_enabled() and getattr(tensor, "requires_grad", False):
        return f"its factor per expert {node.name} requires gradients"
    return ""


def _layer_of(operator: fx.Node) -> tuple[Layer, str]:
    """Return (what an operator's arguments say about its layer, the kernel)."""
    if operator.target is FLOAT:
        floats = FloatMoeArguments.read(operator.args)
        groups: Any = floats.weights
        weights = FloatWeights(*(tuple(map(meta_value, group)) for group in groups))
        settings, biased = Settings.of_floats(weights, floats.form), weights.biased
        _, _, intermediate = floats.form.sizes(weights)
    else:
        packed = MoeArguments.read(operator.args)
        settings, biased = packed.settings, packed.operands.down_bias is not None
        down: Any = packed.operands.down_packed
        intermediate = FORMATS[settings.format].elements(meta_value(down).shape[2])
    sizes = {
        "num_experts": int(settings.num_experts),
        "hidden_size": int(meta_value(_node(operator.args[0])).shape[1]),
        "intermediate_size": int(intermediate),
    }
    return Layer.of(settings, **sizes, biased=biased), settings.kernel


def _kernel_reason(operator: fx.Node, form: RoutingForm) -> str:
    assert form.routing is not None
    layer, kernel = _layer_of(operator)
    layer = dataclasses.replace(layer, top_k=form.routing.top_k)
    reasons = get_kernel(kernel).reasons_not_to_route(layer, form.routing)
    return f"kernel {kernel} does not route so: {'; '.join(reasons)}" if reasons else ""


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _stored(gm: fx.GraphModule, values: dict[fx.Node, Any], node: fx.Node) -> Any:
    return read_attribute(gm, node) if node.op == "get_attr" else values.get(node)


def _insert_choice(
    gm: fx.GraphModule, flow: Flow, node: fx.Node, found: RoutingSlice, form: RoutingForm
) -> None:
    """Let choose_experts say the operator's ids and routing weights."""
    assert form.routing is not None and form.output_scale is not None
    key = "example_value" if "example_value" in node.meta else "val"
    choose = torch.ops.fp4moe.choose_experts.default
    with gm.graph.inserting_before(node):
        bias = _vector(gm.graph, found, form.bias)
        scale = found.vectors[form.output_scale]
        arguments = (found.logits, bias, scale, *form.routing)
        both = gm.graph.call_function(choose, arguments)
        with getattr(meta_value(found.logits), "fake_mode", None) or contextlib.nullcontext():
            values: Any = fx.node.map_arg(arguments, meta_value)
            both.meta = {**node.meta, key: choose(*values)}
        parts = []
        for number, value in enumerate(both.meta[key]):
            parts.append(gm.graph.call_function(getitem, (both, number)))
            parts[-1].meta = {**node.meta, key: value}
    hidden, _ids, _weights, *others = node.args
    node.args = (hidden, *parts, *others)
    _erase_unused(gm.graph, flow, found)


def _vector(graph: fx.Graph, found: RoutingSlice, number: int | None) -> fx.Node:
    return insert_nothing(graph, found.logits) if number is None else found.vectors[number]


def _insert(
    gm: fx.GraphModule,
    flow: Flow,
    operator: fx.Node,
    found: RoutingSlice,
    form: RoutingForm,
    factors: dict[str, torch.Tensor] | None,
) -> None:
    """Put the operator that routes in place; factors are down's new operands, if any."""
    assert form.routing is not None
    unscaled = []
    with gm.graph.inserting_before(operator):
        logits, bias = found.logits, _vector(gm.graph, found, form.bias)
        if operator.target is FLOAT:
            floats = FloatMoeArguments.read(operator.args)
            scale = _vector(gm.graph, found, form.output_scale)
            given = (floats.hidden, logits, bias, scale, floats.weights, form.routing, floats.form)
            arguments = FloatMoeFromLogitsArguments(*given).flat()
            fused = gm.graph.call_function(FLOAT_FROM_LOGITS, arguments)
        else:
            packed = MoeArguments.read(operator.args)
            operands: Any = packed.operands
            for name, tensor in (factors or {}).items():
                unscaled.append(_node(getattr(operands, name)))
                new = f"fp4moe_scaled_{unscaled[-1].name}"
                operands = operands._replace(**{name: add_attribute(gm, operator, new, tensor)})
            call = MoeFromLogitsArguments(
                packed.hidden, logits, bias, operands, form.routing, packed.settings
            )
            nothing = insert_nothing(gm.graph, logits) if lacks_biases(call) else None
            fused = gm.graph.call_function(call.operator, call.flat(nothing))
    fused.meta.update(operator.meta)
    operator.replace_all_uses_with(fused)
    gm.graph.erase_node(operator)
    for node in unscaled:
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    _erase_unused(gm.graph, flow, found)


def _erase_unused(graph: fx.Graph, flow: Flow, found: RoutingSlice) -> None:
    """Remove the slice, all but what others read and what writes to that."""
    inside = set(found.nodes)
    # Export checks the dtype of a cast so; there is no other use of the value then.
    for user in [user for node in found.nodes for user in node.users]:
        if user.target is torch.ops.aten._assert_tensor_metadata.default and user not in inside:
            graph.erase_node(user)
    waiting = [n for n in found.nodes if any(user not in inside for user in n.users)]
    kept: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in kept:
            continue
        kept.add(node)
        waiting += [n for n in node.all_input_nodes if n in inside]
        waiting += [n for n in node.users if node in flow.writes.get(n, ())]
    for node in reversed(found.nodes):
        if node not in kept:
            graph.erase_node(node)
