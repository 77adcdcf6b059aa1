"""Run a part of a graph on other tensors, in float32 whatever the graph says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fp4moe.borrowed import random_state_kept
from fp4moe.precision import float32_as_written

from .attributes import read_attribute
from .dataflow import hinted_shape, is_data, meta_value, operation_name, size_hint

__all__ = ["grouped_mm", "run_in_float32", "undisturbed"]

HALF = (torch.bfloat16, torch.float16)


def run_in_float32(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], values: dict[fx.Node, Any], *outputs: fx.Node
) -> list[Any]:
    """Run the nodes in order and return what `outputs` hold at the end.

    Args:
        gm: owns attributes and modules. values: what feeds the nodes; is used up.

    Raises:
        ValueError: a node reads what was not given, or is a module with parameters. Beyond that
            whatever the operations raise.
    """
    last_user = {source: node for node in nodes for source in node.all_input_nodes}
    for node in nodes:
        if node not in values:
            values[node] = _run(gm, node, values)
        # Gathered weights are large: what nothing reads any more is freed.
        for source in node.all_input_nodes:
            if last_user[source] is node and source not in outputs:
                values.pop(source, None)
    return [values[output] for output in outputs]


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node in values:
        return values[node]
    meta = meta_value(node)
    if isinstance(meta, (int, torch.SymInt)) and not is_data(node):
        return size_hint(meta)
    shape = hinted_shape(node)
    if shape is not None:
        # Only its metadata can be meant; a value that was read would show in the numbers.
        dtype = torch.float32 if meta.dtype in HALF else meta.dtype
        fill = float("nan") if dtype.is_floating_point else 0
        return torch.full((1,), fill, dtype=dtype, device=meta.device).expand(shape)
    raise ValueError(f"it reads {node.name} from outside")


def _run(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    meta = meta_value(node)
    if isinstance(meta, (int, torch.SymInt)) and not isinstance(meta, bool) and not is_data(node):
        return size_hint(meta)

    def value(source: fx.Node) -> Any:
        return _value(source, values)

    args: Any = fx.node.map_aggregate(fx.node.map_arg(node.args, value), _widen)
    kwargs: Any = fx.node.map_aggregate(fx.node.map_arg(node.kwargs, value), _widen)
    if node.op == "get_attr":
        return _widen_tensor(read_attribute(gm, node))
    if "grouped_mm" in str(getattr(node.target, "__name__", node.target)):
        return grouped_mm(*args, **kwargs)
    if operation_name(node) == "view" and not isinstance(args[1], torch.dtype):
        # The windows of the probes have other strides than the weights.
        return torch.reshape(args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:])
    if node.op == "call_method":
        method = "float" if node.target in ("bfloat16", "half") else str(node.target)
        return getattr(args[0], method)(*args[1:], **kwargs)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if [*module.parameters(), *module.buffers()]:
            raise ValueError(f"it calls {type(module).__name__} {node.target}, which holds tensors")
        return module(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _widen_tensor(value: Any) -> Any:
    # A copy: the region may write to it.
    if isinstance(value, torch.Tensor):
        return value.detach().to(torch.float32 if value.dtype in HALF else value.dtype, copy=True)
    return value


def _widen(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: Any = None,
) -> torch.Tensor:
    """torch._grouped_mm for x [S, K] and weight [E, K, N]; rows behind the last offset are NaN."""
    if bias is not None:
        raise ValueError("grouped_mm with a bias, which the operator does not add")
    out = x.new_full((x.shape[0], weight.shape[2]), float("nan"))
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            out[start:stop] = x[start:stop] @ weight[expert]
        start = stop
    return out


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Float32 as it is written, without gradients, and the caller's random state untouched."""
    with (
        # A caller's fake mode would turn every probe into a fake.
        unset_fake_temporarily(),
        torch.inference_mode(False),
        torch.no_grad(),
        random_state_kept(device),
        # TF32 and autocast would blur the two GELUs.
        float32_as_written(device),
    ):
        # Not torch.manual_seed, which would reach devices that are not put back.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        yield
