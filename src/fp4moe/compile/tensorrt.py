"""Torch-TensorRT around the fused operator: options for the backend, a lowering pass for exports.

The operator has no TensorRT converter: it runs in PyTorch between two engines, and N layers of
experts make N + 1 engines. That is no graph break of torch.compile, though Torch-TensorRT's
documents call it one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from ..errors import UnsupportedError, must, refuse
from ..formats import DEFAULT_FORMAT
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT
from ..passes.graph.dataflow import meta_value
from ..passes.report import RewriteReport, report_no_match
from ..passes.rewrite import rewrite_graph
from ..passes.settings import RewriteSettings

__all__ = ["BACKENDS", "import_torch_tensorrt", "lowering_pass", "with_defaults"]

logger = logging.getLogger("fp4moe")
# The names that torch_tensorrt registers when it is imported.
BACKENDS = ("torch_tensorrt", "tensorrt")
# What its torch.compile backend reads beyond CompilationSettings.
MORE_OPTIONS = {"custom_engine_cache", "debug", "engine_cache_dir", "engine_cache_size"}


def import_torch_tensorrt(caller: str) -> Any:
    """Import torch_tensorrt, which registers its backends.

    Raises:
        UnsupportedError: it cannot be imported; says why and what to install.
    """
    try:
        import torch_tensorrt
    except Exception as error:  # it raises a plain Exception where TensorRT's libraries are missing
        refuse(
            caller,
            "torch_tensorrt cannot be imported",
            f"of {type(error).__name__}: {error}",
            "Install the torch-tensorrt that was built for this torch, and TensorRT from "
            "NVIDIA's own package index: the packages of that name elsewhere only point there.",
            cause=error,
        )
    return torch_tensorrt


def with_defaults(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return options for Torch-TensorRT that let a failed build raise, unless they say otherwise.

    With its own default the failure is logged, and the model runs in PyTorch from then on.

    Raises:
        UnsupportedError: an option that Torch-TensorRT does not know and would drop silently.
    """
    import_torch_tensorrt("backend")
    from torch_tensorrt.dynamo import CompilationSettings

    known = {field.name for field in dataclasses.fields(CompilationSettings)} | MORE_OPTIONS
    for name in options or {}:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"Did you mean {near[0]}?" if near else "See torch_tensorrt's compile settings."
            rule = "be among Torch-TensorRT's settings"
            must("backend: inner_options", rule, repr(name), hint, error=UnsupportedError)
    return {"pass_through_build_failures": True, **(options or {})}


@contextlib.contextmanager
def lowering_pass(
    *,
    kernel: str = "auto",
    format: str = DEFAULT_FORMAT,
    verify: bool = True,
    on_no_match: str = "warn",
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
) -> Iterator[list[RewriteReport]]:
    """Rewrite mixture-of-experts blocks inside `torch_tensorrt.dynamo.compile`; experimental.

        with fp4moe.tensorrt.lowering_pass() as reports:
            module = torch_tensorrt.dynamo.compile(exported_program, inputs)

    It relies on a private list of Torch-TensorRT 2.13. `fp4moe.passes.rewrite_exported` before
    compiling does the same without. For torch.compile use `fp4moe.backend` with
    inner_backend="torch_tensorrt": weights are inputs of the graph there, not stored tensors.

    Args:
        kernel: see `rewrite_exported`, as for the others.
        format: the number format of the packed weights.
        verify: whether to check on large inputs and on further experts.
        on_no_match: "warn", "error" or "ignore".
        hidden_alignment: 128, 256 or 512.
        routing: "given" or "fused".

    Yields:
        A list that gets the report of each graph.

    Raises:
        UnsupportedError: torch_tensorrt cannot be imported, or a value is none of its choices.
    """
    settings = RewriteSettings(kernel, verify, hidden_alignment, routing, format)
    settings.checked(on_no_match, caller="lowering_pass")
    import_torch_tensorrt("lowering_pass")
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import ATEN_POST_LOWERING_PASSES

    reports: list[RewriteReport] = []

    def fuse_moe(gm: fx.GraphModule, *_: Any) -> fx.GraphModule:
        values = [meta_value(node) for node in gm.graph.nodes if node.op == "placeholder"]
        report, _done = rewrite_graph(gm, values, settings, constants=True)
        logger.info("lowering_pass: %s", report)
        report_no_match(report, on_no_match, caller="lowering_pass")
        reports.append(report)
        return gm

    # First: constant folding must not see the float weights' own arithmetic.
    ATEN_POST_LOWERING_PASSES.add_pass_with_index(fuse_moe, 0)
    try:
        yield reports
    finally:
        # By identity: another pass may have been put in front meanwhile.
        passes = ATEN_POST_LOWERING_PASSES.passes
        passes[:] = [each for each in passes if each is not fuse_moe]
