"""The rewrite as a pass of Inductor, for programs that compile with Inductor and no other backend.

    torch.compile(model, options=fp4moe.inductor_options())

It runs on the graph that dynamo hands to Inductor, before AOTAutograd. Weights are placeholders
there, or attributes of the graph module (freezing); the operator looks the packed ones up when it
runs. For exported programs and AOTInductor use `fp4moe.passes.rewrite_exported`.

Against `fp4moe.backend`: the float weights stay, each layer looks at their values by itself, and
Inductor's CUDA graphs are cut at each layer of experts, whose weights they could not follow.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..errors import UnsupportedError, must
from ..formats import DEFAULT_FORMAT
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT
from ..passes.graph.dataflow import meta_value
from ..passes.report import RewriteReport, report_no_match
from ..passes.rewrite import rewrite_graph
from ..passes.settings import RewriteSettings

__all__ = ["MoePass"]

logger = logging.getLogger("fp4moe")
PACKAGE = pathlib.Path(__file__).parents[1]
Pass = Callable[[fx.Graph], None]


class MoePass(CustomGraphPass):
    """A `pre_grad_custom_pass` that rewrites mixture-of-experts blocks.

    Inductor has to run it before it looks into its caches, see `inductor_options`.

    Args:
        kernel, format, verify, on_no_match, hidden_alignment, routing: as the options of
            `fp4moe.backend`; on_no_match is "ignore" by default, as Inductor calls the pass for
            each graph.
        before: passes to run first, such as the one that was set.

    Raises:
        UnsupportedError: a value that is none of its choices. Calling it: Inductor runs it behind
            its cache; or nothing is fused and on_no_match is "error".
    """

    def __init__(
        self,
        *,
        kernel: str = "auto",
        format: str = DEFAULT_FORMAT,
        verify: bool = True,
        on_no_match: str = "ignore",
        hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
        routing: str = "given",
        before: Sequence[Pass] = (),
    ):
        settings = RewriteSettings(kernel, verify, hidden_alignment, routing, format)
        self.settings = settings.checked(on_no_match, caller="inductor_options")
        self.on_no_match = on_no_match
        self.before = tuple(before)
        self.report: RewriteReport | None = None

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place; `report` tells of the last one."""
        _check_timing()
        for earlier in self.before:
            earlier(graph)
        gm = graph.owning_module
        if gm is None:
            rule = "belong to a GraphModule"
            got = "one without"
            must("inductor_options: graph", rule, got, "Pass gm.graph.", error=UnsupportedError)
        if config.triton.cudagraphs and not getattr(config, "graph_partition", False):
            must(
                "inductor_options: torch._inductor.config.graph_partition",
                "be True with CUDA graphs, which are cut at the experts",
                "False",
                "Set it, or use fp4moe.backend with mode='reduce-overhead'.",
                error=UnsupportedError,
            )
        inputs = [_value(node) for node in graph.nodes if node.op == "placeholder"]
        self.report, _ = rewrite_graph(gm, inputs, self.settings)
        logger.info("inductor_options: %s", self.report)
        # Inductor calls for the bodies of higher-order operators first, one by one.
        placeholders = [node.meta for node in graph.find_nodes(op="placeholder")]
        body = any("example_value" in meta for meta in placeholders) and not any(
            "grapharg" in meta for meta in placeholders
        )
        on_no_match = "ignore" if body else self.on_no_match
        report_no_match(self.report, on_no_match, caller="inductor_options")

    def uuid(self) -> str | None:
        """Return a hash of the passes' sources, the settings and the passes before, for caches.

        None, which keeps Inductor from caching, where a pass before has no uuid of its own.
        """
        earlier = [getattr(p, "uuid", lambda: None)() for p in self.before]
        if any(name is None for name in earlier):
            return None
        digest = hashlib.sha256(repr((self.settings, self.on_no_match, earlier)).encode())
        digest.update(torch.__version__.encode())
        # All of the package: what a pass writes into a graph follows from its quantiser and
        # kernels, too.
        for folder in (PACKAGE, pathlib.Path(passes_folder())):
            for file in sorted(folder.rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
        return digest.hexdigest()


def passes_folder() -> str:
    """The folder of fp4moe.passes, which an editable install keeps apart."""
    from .. import passes

    return passes.__path__[0]


def _check_timing() -> None:
    # torch 2.13 looks into the cache first if each pass has a uuid. A graph from the cache names a
    # kernel, which another machine or installation may have chosen.
    try:
        from torch._inductor.codecache import resolve_pre_grad_pass_timing
    except ImportError:
        return
    if resolve_pre_grad_pass_timing() == "late":
        must(
            "inductor_options: torch._inductor.config.pre_grad_pass_timing",
            "be 'early', for the kernel must be chosen before Inductor looks into its caches",
            repr(config.pre_grad_pass_timing),
            "Use fp4moe.inductor_options(), which sets it.",
            error=UnsupportedError,
        )


def _value(node: fx.Node) -> Any:
    """The real tensor of a placeholder where dynamo still knows it, its metadata otherwise."""
    record = node.meta.get("grapharg")
    example = getattr(record, "example", None)
    return example if isinstance(example, torch.Tensor) else meta_value(node)
