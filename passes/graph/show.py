"""Print a graph in a form that does not change with torch's own printer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .dataflow import meta_value

__all__ = ["show_graph"]

SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "bool": "b8",
}


def show_graph(gm: fx.GraphModule, within: str = "") -> str:
    """Return one line a node: `name: dtype[shape] = op(args)`.

    Args:
        gm: the graph.
        within: only nodes recorded inside the module of that dotted name, and what feeds them.
    """
    lines = []
    for node in gm.graph.nodes:
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if node.op in ("placeholder", "output") or not any(_inside(path, within) for path in paths):
            continue
        lines.append(f"{node.name}{_type(meta_value(node))} = {_call(node)}")
    return "\n".join(lines)


def _inside(path: str, within: str) -> bool:
    plain = path.removeprefix("L['self'].")
    return not within or plain == within or plain.startswith(f"{within}.")


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f": {SHORT.get(name, name)}[{', '.join(map(str, value.shape))}]"
    return ""


def _call(node: fx.Node) -> str:
    if node.op == "get_attr":
        return f"attribute {node.target}"
    target = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )
    if isinstance(node.target, torch._ops.OpOverload):
        target = str(node.target)
    args = [str(arg) for arg in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{target}({', '.join(args)})"
