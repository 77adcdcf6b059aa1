"""Tensors that a graph module owns: read and added by name."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import fx

from .dataflow import meta_value

__all__ = ["add_attribute", "insert_nothing", "read_attribute"]


def read_attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return what a get_attr node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def add_attribute(gm: fx.GraphModule, near: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
    """Read a tensor where nodes are inserted now, as a buffer of the graph module.

    Args:
        gm: changed in place. near: a node whose metadata shows how this graph writes it.
        name: of the buffer; with a number behind it where it is taken, and not used where the
            tensor is a buffer already.
    """
    known = [other for other, buffer in gm.named_buffers() if buffer is tensor]
    if known:
        name = known[0]
    else:
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        name = next(free for free in names if not hasattr(gm, free))
        gm.register_buffer(name, tensor, persistent=False)
        # AOTAutograd asks where each attribute of a dynamo graph comes from.
        sources = getattr(gm, "_param_name_to_source", None)
        if sources is not None:
            sources[name] = torch._dynamo.source.ConstantSource(name)
    node = gm.graph.get_attr(name)
    key = "example_value" if "example_value" in near.meta else "val"
    # Static: the shape environment would otherwise make a symbol of each size.
    mode = getattr(meta_value(near), "fake_mode", None)
    node.meta[key] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
    node.meta["nn_module_stack"] = near.meta.get("nn_module_stack")
    return node


def insert_nothing(graph: fx.Graph, like: fx.Node) -> fx.Node:
    """Insert a float tensor of size 0, which stands for an absent one.

    Args:
        like: a float tensor, whose device it gets.
    """
    node = graph.call_function(torch.ops.aten.new_empty.default, (like, [0]))
    key = "example_value" if "example_value" in like.meta else "val"
    value = meta_value(like)
    with getattr(value, "fake_mode", None) or contextlib.nullcontext():
        node.meta[key] = value.new_empty([0])
    return node
