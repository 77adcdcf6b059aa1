"""Torch-TensorRT's lowering pass under its public name; see `fp4moe.compile.tensorrt`."""

from __future__ import annotations

from .compile.tensorrt import lowering_pass

__all__ = ["lowering_pass"]
