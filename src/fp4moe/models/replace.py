"""replace_moe: put fused NVFP4 experts in the place of a model's mixture-of-experts blocks.

Everything is checked, the numbers included, before the first module changes; then one layer after
the other is packed and its float weights are freed, so that the peak stays below the size of the
model plus two layers. The router stays as it is, or is left its logits (routing="fused"). Not
handled: gradients of the experts, calibration, checkpoints.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from typing import TypeVar

import torch
from torch import nn

from ..errors import UnsupportedError, check_choice, must
from ..formats.nvfp4 import METHODS
from ..kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    HIDDEN_ALIGNMENTS,
    ROUTINGS,
    Layer,
    check_kernel_name,
    choose_kernel,
    current_capability,
    get_kernel,
    select_kernel,
)
from ..module import FusedExperts
from ..padding import round_up
from ..progress import progress_bar
from ..report import BlockReport, ModelReport
from ..routed import RoutedExperts
from .block import ON_META, Candidate, carry_hooks, stored_activation_scales, value_reasons
from .experts_module import find_experts
from .module_list import find_module_lists
from .routers import FusedRouting, plan_fused_routing

__all__ = ["asked_of", "explain", "find_candidates", "replace_moe"]

logger = logging.getLogger("fp4moe")
Model = TypeVar("Model", bound=nn.Module)


def find_candidates(model: nn.Module) -> list[Candidate]:
    """Return every mixture-of-experts block that is not fused yet, in module order."""
    stamped = find_experts(model)
    inside = tuple(f"{c.path}." for c in stamped)
    found = stamped + [c for c in find_module_lists(model) if not c.path.startswith(inside)]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda c: order[c.path])
    _refuse_shared_weights(model, found)
    return found


def replace_moe(
    model: Model,
    kernel: str = "auto",
    strict: bool = True,
    progress: bool = True,
    *,
    method: str = "max",
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
) -> Model:
    """Replace the experts of every mixture-of-experts block by fused NVFP4 experts, in place.

    Hooks of accelerate that only move inputs to the experts' device go over to the fused experts.

    Args:
        model: any module that holds experts modules with stacked weights, such as those of
            transformers, or blocks that loop over a ModuleList of expert MLPs.
        kernel: "auto" or a kernel's name, see `fp4moe.why_not`.
        strict: a block that cannot be replaced is an error; False leaves such blocks as they are
            and logs the reasons.
        progress: show a progress bar on stderr.
        method: "max" or "mse", see `fp4moe.quantize_nvfp4`.
        hidden_alignment: 128, 256 or 512: what the Blackwell kernel pads the hidden size to; other
            kernels do not need it.
        routing: "given": the model's own router chooses. "fused": the kernel does, from the
            router's logits; `output_router_logits` then finds no router to record.

    Returns:
        The same model.

    Raises:
        UnsupportedError: no block found, a block cannot be replaced (strict), an unknown name, or
            no kernel for a block. The model is as it was.
    """
    check_kernel_name(kernel, caller="replace_moe")
    check_choice("method", method, METHODS, caller="replace_moe")
    check_choice("hidden_alignment", hidden_alignment, HIDDEN_ALIGNMENTS, caller="replace_moe")
    check_choice("routing", routing, ROUTINGS, caller="replace_moe")
    _refuse_other_kernels(model, kernel)
    _refuse_other_routing(model, routing)
    candidates = find_candidates(model)
    if not candidates:
        if any(isinstance(m, FusedExperts) for m in model.modules()):
            logger.info("replace_moe: every block of %s is fused already", type(model).__name__)
            return model
        must(
            "replace_moe: model",
            "have mixture-of-experts blocks",
            f"{type(model).__name__} with none that is known",
            "Known are transformers' experts modules and blocks that loop over a ModuleList of "
            "expert MLPs.",
            error=UnsupportedError,
        )
    refused = {}
    root = type(model).__name__
    for candidate in progress_bar(candidates, show=progress, desc="checking experts", leave=False):
        reasons = (
            candidate.reasons or value_reasons(candidate) or _kernel_reasons(candidate, kernel)
        )
        if reasons:
            refused[candidate.path] = reasons
    plans: dict[str, FusedRouting] = {}
    if routing == "fused":
        plans, unroutable = _plan_routing(
            model, [c for c in candidates if c.path not in refused], kernel
        )
        refused |= unroutable
    if refused and strict:
        listed = " ".join(f"{path or root}: {'; '.join(why)}." for path, why in refused.items())
        raise UnsupportedError(
            f"replace_moe: model must have only blocks that can be replaced; got {len(refused)} of "
            f"{len(candidates)} that "
            f"cannot. {listed} Pass strict=False to leave these as they are."
        )
    for path, why in refused.items():
        logger.warning("replace_moe: %s is left as it is: %s", path or root, "; ".join(why))
    paths = [c.path for c in candidates if c.path not in refused]
    jobs = {c.path: c for c in candidates}
    # The lists must not keep a replaced layer's weights alive.
    del candidates, candidate
    for path in progress_bar(paths, show=progress, desc="packing experts"):
        job = jobs.pop(path)
        assert job.quantize is not None
        plan = plans.get(path)
        if plan is None:
            experts = FusedExperts(
                job.quantize(method), kernel, hidden_alignment=hidden_alignment, top_k=job.top_k
            )
        else:
            experts = RoutedExperts(
                job.quantize(method),
                plan.routing,
                kernel,
                hidden_alignment=hidden_alignment,
                output_scale=plan.output_scale,
            )
        fused = job.build(experts)
        fused.train(job.module.training)
        carry_hooks(job.module, fused)
        if plan is not None:
            _set_submodule(model, plan.path, plan.router)
        _set_submodule(model, path, fused)
    return model


def explain(model: nn.Module, kernel: str = "auto", *, only_structure: bool = False) -> ModelReport:
    """Report on each block: replaced, replaceable or not and why, kernel, padded sizes, bytes.

    Works before and after `replace_moe`; reads sizes and a few numbers, changes nothing.
    """
    check_kernel_name(kernel, caller="explain")
    rows = {}
    for candidate in find_candidates(model):
        reasons = candidate.reasons or (candidate.verify() if candidate.verify else [])
        if only_structure:
            reasons = [reason for reason in reasons if not reason.endswith(ON_META)]
        rows[candidate.path] = _candidate_row(candidate, kernel, reasons)
    for path, module in model.named_modules():
        if isinstance(module, FusedExperts):
            rows[path] = _fused_row(path, module)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return ModelReport(
        type(model).__name__, tuple(sorted(rows.values(), key=lambda row: order[row.path]))
    )


def _refuse_other_kernels(model: nn.Module, kernel: str) -> None:
    fused = {path: m.kernel for path, m in model.named_modules() if isinstance(m, FusedExperts)}
    for path, present in fused.items():
        if kernel not in ("auto", present):
            must(
                "replace_moe: kernel",
                "be that of the blocks which are fused already",
                f"{kernel!r}, but {path or type(model).__name__} has {present!r}",
                "Load the float model again.",
                error=UnsupportedError,
            )


def _refuse_other_routing(model: nn.Module, routing: str) -> None:
    for path, module in model.named_modules():
        given = isinstance(module, FusedExperts) and not isinstance(module, RoutedExperts)
        if given and routing == "fused":
            must(
                "replace_moe: routing",
                "be that of the blocks which are fused already",
                f"{routing!r}, but {path or type(model).__name__} has 'given'",
                "Load the float model again.",
                error=UnsupportedError,
            )


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _refuse_shared_weights(model: nn.Module, candidates: list[Candidate]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (
            not isinstance(parameter, nn.UninitializedParameter)
            and parameter.device.type != "meta"
            and type(parameter.data) is torch.Tensor
            and parameter.numel()
        ):
            names[parameter.untyped_storage().data_ptr()].append(name)
    for candidate in candidates:
        for name, weight in candidate.parameters.items():
            if weight.device.type == "meta" or type(weight.data) is not torch.Tensor:
                continue
            full = f"{candidate.path}.{name}".lstrip(".")
            others = [n for n in names[weight.untyped_storage().data_ptr()] if n != full]
            if others and weight.untyped_storage().nbytes():
                candidate.reasons.append(
                    f"{name} shares its storage with {', '.join(others[:3])}; untie them first"
                )


def asked_of(candidate: Candidate) -> tuple[Layer, tuple[int, int] | None]:
    """Return what a kernel is asked to run for a candidate whose form is known, and where."""
    assert candidate.activation and candidate.hidden_size and candidate.intermediate_size
    layer = Layer.of(candidate, gated=bool(candidate.gated), num_experts=candidate.num_experts or 0)
    return layer, current_capability(next(iter(candidate.parameters.values())).device)


def _kernel_reasons(candidate: Candidate, kernel: str) -> list[str]:
    return choose_kernel(kernel, *asked_of(candidate))[1]


def _plan_routing(
    model: nn.Module, candidates: list[Candidate], kernel: str
) -> tuple[dict[str, FusedRouting], dict[str, list[str]]]:
    plans, refused = plan_fused_routing(model, candidates)
    for candidate in candidates:
        if plan := plans.get(candidate.path):
            layer, capability = asked_of(candidate)
            layer = dataclasses.replace(layer, top_k=plan.routing.top_k)
            name = select_kernel(kernel, layer, capability, caller="replace_moe")
            reasons = get_kernel(name).reasons_not_to_route(layer, plan.routing)
            if reasons:
                refused[candidate.path] = [f"{name}: {why}" for why in reasons]
    return plans, refused


def _candidate_row(candidate: Candidate, kernel: str, reasons: list[str]) -> BlockReport:
    name, padded = None, None
    if not reasons:
        reasons = _kernel_reasons(candidate, kernel)
    if not reasons:
        layer, capability = asked_of(candidate)
        name = select_kernel(kernel, layer, capability, caller="explain")
        multiples = get_kernel(name).size_multiples(layer, DEFAULT_HIDDEN_ALIGNMENT)
        padded = tuple(
            round_up(s, m)
            for s, m in zip((layer.hidden_size, layer.intermediate_size), multiples, strict=True)
        )
    notes = (
        ["activation ranges are calibrated"] if stored_activation_scales(candidate.module) else []
    )
    return BlockReport(
        path=candidate.path,
        module=type(candidate.module).__name__,
        status="not replaceable" if reasons else "replaceable",
        reasons=tuple(reasons or notes),
        activation=candidate.activation,
        gated=candidate.gated,
        num_experts=candidate.num_experts,
        top_k=candidate.top_k,
        hidden_size=candidate.hidden_size,
        intermediate_size=candidate.intermediate_size,
        padded_sizes=padded,
        kernel=name,
        nbytes=candidate.nbytes,
    )


def _fused_row(path: str, module: FusedExperts) -> BlockReport:
    meta, prepared = module.metadata, module.prepared.operands
    routing = module.routing if isinstance(module, RoutedExperts) else None
    notes = [f"the kernel routes ({routing.method})"] if routing else []
    scales = module.activation_scales()
    if not prepared.hidden_scale.is_meta and all(bool((s == 1).all()) for s in scales):
        notes.append("activation ranges are not calibrated (only W4A4 kernels use them)")
    return BlockReport(
        path=path,
        module=type(module).__name__,
        status="replaced",
        reasons=tuple(notes),
        activation=meta["activation"],
        gated=meta["gated"],
        num_experts=meta["num_experts"],
        top_k=routing.top_k if routing else None,
        hidden_size=meta["hidden_size"],
        intermediate_size=meta["intermediate_size"],
        padded_sizes=(prepared.down_packed.shape[1], prepared.down_packed.shape[2] * 2),
        kernel=module.kernel,
        nbytes=module.nbytes,
    )
