"""`torch.compile(model, backend=fp4moe.backend)`: rewrite the graph, then call another backend."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from ..errors import UnsupportedError, check_choice, must
from ..formats import DEFAULT_FORMAT
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT
from ..models.experts_module import is_experts_module
from ..passes.lift import lift_packed
from ..passes.report import RewriteReport, report_no_match
from ..passes.rewrite import rewrite_graph
from ..passes.settings import RewriteSettings
from .packed_inputs import WithPackedInputs
from .tensorrt import BACKENDS, import_torch_tensorrt, with_defaults

__all__ = ["BackendOptions", "backend", "inductor_options"]

logger = logging.getLogger("fp4moe")
_warned_eager = False


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """The `options=` of `torch.compile(model, backend=fp4moe.backend, options={...})`.

    Attributes:
        inner_backend: what compiles the rewritten graph: "inductor", any registered name such as
            "torch_tensorrt" (imported then), or a callable.
        inner_options: handed to it as `options`.
        on_no_match: "warn", "error" or "ignore" when a graph has no block that is or was fused.
        kernel: "auto" or a kernel's name.
        format: what the weights are quantised to, a name of `fp4moe.formats.FORMATS`.
        verify: False leaves out the checks of each distinct block on large inputs and on further
            experts; see `rewrite_moe`.
        release_weights: free the float weights after packing. Shapes stay. Running the experts in
            eager, writing to these weights or saving them raises from then on.
        hidden_alignment: 128, 256 or 512, what the Blackwell kernel pads the hidden size to.
        routing: "given" keeps the model's own router; "fused" lets the kernel choose the experts
            where the router's numbers are a method of the kernel's, and warns where not.
    """

    inner_backend: str | Callable = "inductor"
    inner_options: dict[str, Any] | None = None
    on_no_match: str = "warn"
    kernel: str = "auto"
    format: str = DEFAULT_FORMAT
    verify: bool = True
    release_weights: bool = False
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT
    routing: str = "given"

    @classmethod
    def parse(cls, options: dict[str, Any] | None) -> BackendOptions:
        """Check names and values.

        Raises:
            UnsupportedError: an unknown option, or a value that is none of its choices.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"Did you mean {near[0]}?"
                    if near
                    else "Options of the inner backend go into inner_options."
                )
                rule = f"be among {', '.join(known)}"
                must("backend: options", rule, repr(name), hint, error=UnsupportedError)
        parsed = cls(**(options or {}))
        parsed.settings().checked(parsed.on_no_match, caller="backend")
        check_choice("release_weights", parsed.release_weights, (True, False), caller="backend")
        if not isinstance(parsed.inner_options, (dict, type(None))):
            got = repr(parsed.inner_options)
            advice = "Pass the options of the inner backend by name."
            must("backend: inner_options", "be a dict or None", got, advice, error=UnsupportedError)
        inner = parsed.inner_backend
        if inner in BACKENDS:
            import_torch_tensorrt("backend")
        if not callable(inner) and inner not in torch._dynamo.list_backends(exclude_tags=()):
            rule = "be a callable or a registered name"
            advice = f"Registered are {', '.join(torch._dynamo.list_backends(exclude_tags=()))}."
            must("backend: inner_backend", rule, repr(inner), advice, error=UnsupportedError)
        return parsed

    def settings(self) -> RewriteSettings:
        """Return those that the rewrite takes."""
        return RewriteSettings(**{name: getattr(self, name) for name in RewriteSettings._fields})


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Rewrite the mixture-of-experts blocks of a graph and compile it with the inner backend.

    Pass it to `torch.compile(model, backend=fp4moe.backend, options={...})`; see `BackendOptions`
    for the options. `mode` is handed on to the inner backend where that takes one.

    The compiled graph holds no weights, so it serves every module that torch.compile runs with it.
    At each call the packed weights are looked up by the float ones. They are packed at first sight,
    shared by all graphs, and die with the float ones. Float weights that change are packed again
    at the next call. If only their values tell, as after writes through `.data`, a GPU notices it
    one call later.

    Raises:
        UnsupportedError: an unknown option, or no block in the graph with on_no_match="error".
    """
    parsed = BackendOptions.parse(options)
    report, _ = rewrite_graph(graph_module, example_inputs, parsed.settings())
    logger.info("fp4moe.backend: %s", report)
    _report_problems(report, parsed)
    lifted = lift_packed(graph_module, example_inputs)
    if not lifted.layers:
        return _call_inner(parsed, mode, graph_module, example_inputs)
    _keep_static(lifted.inputs[len(lifted.kept) :])
    compiled = _call_inner(parsed, mode, lifted.graph_module, lifted.inputs)
    return WithPackedInputs(compiled, lifted, release=parsed.release_weights)


def _keep_static(tensors: Sequence[torch.Tensor]) -> None:
    """Tell AOTAutograd that sizes of inputs that dynamo does not know are numbers, not symbols."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    for number, tensor in enumerate(tensors):
        context.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * tensor.ndim,
            tensor_source=torch._dynamo.source.ConstantSource(f"fp4moe_packed_{number}"),
        )


def inductor_options(**settings: Any) -> dict[str, Any]:
    """Return the settings that make Inductor itself run the rewrite, see `inductor_pass.MoePass`.

    For `torch.compile(model, options=...)` and `torch._inductor.config.patch(...)`. A
    `pre_grad_custom_pass` that is set now runs first.

    Args:
        settings: those of `MoePass`.

    Raises:
        UnsupportedError: a value that is none of its choices.
    """
    # Here: Inductor takes seconds to import.
    from torch._inductor import config

    from .inductor import MoePass

    present = config.pre_grad_custom_pass
    listed = list(present) if isinstance(present, (list, tuple)) else [present]
    before = [*settings.pop("before", ()), *(each for each in listed if each is not None)]
    options: dict[str, Any] = {"pre_grad_custom_pass": MoePass(**settings, before=before)}
    # Inductor's CUDA graphs would go on with the weights of their recording.
    cut = {"fp4moe::float_moe", "fp4moe::float_moe_from_logits"}
    options["custom_should_partition_ops"] = [
        *config.custom_should_partition_ops,
        *sorted(cut.difference(config.custom_should_partition_ops)),
    ]
    if hasattr(config, "pre_grad_pass_timing"):
        # torch 2.13: before the look into the cache, see MoePass.
        options["pre_grad_pass_timing"] = "early"
    return options


def _report_problems(report: RewriteReport, options: BackendOptions) -> None:
    global _warned_eager
    refusal, on_no_match = None, options.on_no_match
    eager = None if report.count or report.already_fused else _eager_experts()
    if eager:
        refusal = (
            f"the experts of {eager} cannot be captured",
            "the loop of their implementation 'eager' breaks the graph",
            "Call model.set_experts_implementation('grouped_mm') before compiling.",
        )
        # Its loop leaves many graphs without experts, all for the same reason.
        if _warned_eager and on_no_match == "warn":
            on_no_match = "ignore"
        _warned_eager |= on_no_match == "warn"
    report_no_match(report, on_no_match, caller="backend", refusal=refusal)


def _eager_experts() -> str | None:
    """Name an experts module that runs in eager below a module whose forward is on the stack.

    Its loop never reaches a backend, so the callers' frames are asked.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        for path, module in caller.named_modules() if isinstance(caller, torch.nn.Module) else ():
            implementation = getattr(
                getattr(module, "config", None), "_experts_implementation", None
            )
            if is_experts_module(module) and implementation == "eager":
                return f"{type(caller).__name__}.{path}" if path else type(caller).__name__
        frame = frame.f_back
    return None


def _call_inner(
    options: BackendOptions, mode: str | None, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable:
    if options.inner_backend == "inductor":
        # The wrapper that torch.compile itself uses: it knows modes and checks options.
        inductor = torch._TorchCompileInductorWrapper(mode, options.inner_options, None)
        return inductor(gm, cast("list[torch.Tensor]", inputs))
    inner = options.inner_backend
    inner = inner if callable(inner) else torch._dynamo.lookup_backend(inner)
    accepted = inspect.signature(inner).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    keywords: dict[str, Any] = {}
    if options.inner_backend in BACKENDS:
        keywords["options"] = with_defaults(options.inner_options)
    elif options.inner_options is not None:
        keywords["options"] = options.inner_options
    if mode is not None:
        # Torch-TensorRT takes any keyword, and drops its options where another stands beside them.
        if ("mode" in accepted or any_keyword) and options.inner_backend not in BACKENDS:
            keywords["mode"] = mode
        else:
            logger.warning(
                "fp4moe.backend: inner backend %s takes no mode; %r is not used", inner, mode
            )
    return inner(gm, cast("list[torch.Tensor]", inputs), **keywords)
