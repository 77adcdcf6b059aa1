"""replace_moe: put fused, quantised experts in the place of a model's mixture-of-experts blocks.

Everything is checked, the numbers included, before the first module changes; then one layer after
the other is packed and its float weights are freed, so that the peak stays below the size of the
model plus two layers. The router stays as it is, or chooses in one launch (routing="fused"). Not
handled: gradients of the experts' weights, calibration, checkpoints.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from ..errors import ShapeError, check_choice, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
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
from ..parallel import gather_objects
from ..part import whole_count
from ..progress import progress_bar
from ..report import BlockReport, ModelReport
from .block import ON_META, Candidate, carry_hooks, stored_activation_scales, value_reasons
from .experts_module import find_experts
from .linears import choose_linears, pack_linear, shared_extremes
from .module_list import find_module_lists
from .quantized import mark_quantized
from .routers import FusedRouter, fuse_router
from .routing_plan import fused_router_beside, plan_fused_routing
from .sharding import Sharding

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
    format: str = DEFAULT_FORMAT,
    method: str = "max",
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
    linears: str | Sequence[str] = "none",
) -> Model:
    """Replace the experts of every block by quantised experts that run as one operator, in place.

    Every block is checked before the first one changes. Then one layer after the other is packed,
    and its float weights are freed. Hooks of accelerate that only move inputs are kept.

    Args:
        model: a module with experts in stacked weights, such as those of transformers, or with
            blocks that loop over a ModuleList of expert MLPs.
        kernel: "auto", or the name of a kernel, see `fp4moe.why_not`.
        strict: True raises an error if a block cannot be replaced. False leaves such blocks as
            they are and logs the reasons.
        progress: whether to show a progress bar on stderr; a log gets none.
        format: the number format of the packed weights, a name of `fp4moe.formats.FORMATS`.
        method: how block scales are chosen, "max" or "mse", see `fp4moe.quantize_nvfp4`.
        hidden_alignment: 128, 256 or 512, the multiple to which the Blackwell kernel pads the
            hidden size. Other kernels do not use it.
        routing: "given" leaves the model's router as it is. "fused" makes it choose in one launch;
            it returns the same. Kernels that only run with their own routing need "fused", and
            `fp4moe.backend` with routing="fused".
        linears: "none", or names and patterns (as in fnmatch) of dense `torch.nn.Linear` modules.
            They become `fp4moe.PackedLinear` of the same format. A pattern does not match output
            heads and routers (`lm_head`, `gate`, ...); give their whole names.

    Returns:
        The same model.

    Raises:
        UnsupportedError: no block is found, a block cannot be replaced (strict), no kernel runs
            one, a Linear cannot be quantised, or a name is unknown. The model is as it was.
    """
    check_kernel_name(kernel, caller="replace_moe")
    check_choice("format", format, FORMATS, caller="replace_moe")
    FORMATS[format].check_method(method, caller="replace_moe")
    check_choice("hidden_alignment", hidden_alignment, HIDDEN_ALIGNMENTS, caller="replace_moe")
    check_choice("routing", routing, ROUTINGS, caller="replace_moe")
    _refuse_others(model, kernel, format)
    candidates = find_candidates(model)
    fused_now = {p: m for p, m in model.named_modules() if isinstance(m, FusedExperts)}
    present = {p: whole_count(m.num_experts, m.parts) for p, m in fused_now.items()}
    if not candidates and present:
        logger.info("replace_moe: every block of %s is fused already", type(model).__name__)
    elif not candidates:
        refuse(
            "replace_moe",
            f"{type(model).__name__} cannot be changed",
            "none of its modules is a known block of experts",
            "Known are transformers' experts modules and blocks that loop over a ModuleList of "
            "expert MLPs.",
        )
    root = type(model).__name__
    refused = _refused(candidates, kernel, format, routing, progress)
    sharding = Sharding.of(model)
    if sharding is not None and sharding.is_done:
        # One process must not begin what another refuses.
        refused = {path: why for found in gather_objects(refused) for path, why in found.items()}
    blocks = present | {
        c.path: whole_count(c.num_experts or 0, [c.part(format)] if c.part else [])
        for c in candidates
        if c.path not in refused
    }
    plans, unroutable = plan_fused_routing(model, blocks if routing == "fused" else {})
    refused |= unroutable
    if refused and strict:
        listed = ". ".join(f"{path or root}: {'; '.join(why)}" for path, why in refused.items())
        what = f"{len(refused)} of {len({*blocks, *refused})} blocks cannot be replaced"
        refuse("replace_moe", what, listed, "Pass strict=False to leave these as they are.")
    for path, why in refused.items():
        logger.warning("replace_moe: %s is left as it is: %s", path or root, "; ".join(why))
    dense = choose_linears(model, linears, format, [c.module for c in candidates])
    paths = [c.path for c in candidates if c.path not in refused]
    jobs = {c.path: c for c in candidates}
    # The list must not keep a replaced layer's weights alive.
    del candidates
    for path in progress_bar(paths, show=progress, desc="packing experts"):
        job = jobs.pop(path)
        assert job.quantize is not None
        experts = FusedExperts(
            job.quantize(method, format),
            kernel,
            hidden_alignment=hidden_alignment,
            top_k=job.top_k,
            routing=routing,
        )
        experts.float_layout = job.storage.layout if job.storage else None
        fused = job.build(experts)
        fused.train(job.module.training)
        carry_hooks(job.module, fused)
        _set_submodule(model, path, fused)
        if job.part is not None and sharding is not None:
            experts.parts = (job.part(format),)
            sharding.install(path, fused)
    for plan in plans.values():
        fuse_router(model.get_submodule(plan.path), plan.routing)
    extremes = shared_extremes(dense, format)
    for path in progress_bar(list(dense), show=progress and bool(dense), desc="packing Linears"):
        linear = dense.pop(path)
        packed = pack_linear(linear, format, method, kernel, extremes[path])
        carry_hooks(linear, packed)
        _set_submodule(model, path, packed)
    mark_quantized(model)
    return model


def explain(
    model: nn.Module,
    kernel: str = "auto",
    *,
    format: str = DEFAULT_FORMAT,
    only_structure: bool = False,
) -> ModelReport:
    """Report on each block of experts: its state, the reason, its sizes, format, kernel and bytes.

    This works before and after `replace_moe`. It reads sizes and a few numbers, and changes
    nothing. `print` the result for a table.

    Args:
        model: any module.
        kernel: the kernel that `replace_moe` would be asked for.
        format: the number format that `replace_moe` would be asked for.
        only_structure: whether to accept weights that are not loaded (on the meta device).

    Raises:
        UnsupportedError: no such kernel or format.
    """
    check_kernel_name(kernel, caller="explain")
    check_choice("format", format, FORMATS, caller="explain")
    rows = {}
    for candidate in find_candidates(model):
        reasons = candidate.reasons or (candidate.verify() if candidate.verify else [])
        if only_structure:
            reasons = [reason for reason in reasons if not reason.endswith(ON_META)]
        rows[candidate.path] = _candidate_row(candidate, kernel, format, reasons)
    for path, module in model.named_modules():
        if isinstance(module, FusedExperts):
            rows[path] = _fused_row(path, module, fused_router_beside(model, path))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return ModelReport(
        type(model).__name__, tuple(sorted(rows.values(), key=lambda row: order[row.path]))
    )


def _refused(
    candidates: list[Candidate], kernel: str, format: str, routing: str, progress: bool
) -> dict[str, list[str]]:
    """Return the reasons against those that cannot be replaced, by path."""
    refused = {}
    for candidate in progress_bar(candidates, show=progress, desc="checking experts", leave=False):
        reasons = (
            candidate.reasons
            or value_reasons(candidate)
            or _part_reasons(candidate, format)
            or choose_kernel(kernel, *asked_of(candidate, format, routing))[1]
        )
        if reasons:
            refused[candidate.path] = reasons
    return refused


def _part_reasons(candidate: Candidate, format: str) -> list[str]:
    try:
        if candidate.part is not None:
            candidate.part(format)
    except ShapeError as error:
        return [str(error).rstrip(".")]
    return []


def _refuse_others(model: nn.Module, kernel: str, format: str) -> None:
    """Raise unless the blocks that are fused already have this kernel and format."""
    for path, module in model.named_modules():
        if not isinstance(module, FusedExperts):
            continue
        present = {"kernel": module.kernel, "format": module.layer.format}
        for name, asked in (("kernel", kernel), ("format", format)):
            if asked not in ("auto", present[name]):
                what = f"the blocks cannot get {name} {asked!r}"
                reason = f"{path or type(model).__name__} is fused already, with {present[name]!r}"
                refuse("replace_moe", what, reason, "Load the float model again.")


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


def asked_of(
    candidate: Candidate, format: str = DEFAULT_FORMAT, routing: str = "given"
) -> tuple[Layer, tuple[int, int] | None]:
    """Return what a kernel is asked to run for a candidate whose form is known, and where."""
    assert candidate.activation and candidate.hidden_size and candidate.intermediate_size
    layer = Layer.of(
        candidate,
        gated=bool(candidate.gated),
        num_experts=candidate.num_experts or 0,
        format=format,
        kernel_routes=routing == "fused",
    )
    return layer, current_capability(next(iter(candidate.parameters.values())).device)


def _candidate_row(
    candidate: Candidate, kernel: str, format: str, reasons: list[str]
) -> BlockReport:
    name, padded = None, None
    if not reasons:
        reasons = (
            _part_reasons(candidate, format)
            or choose_kernel(kernel, *asked_of(candidate, format))[1]
        )
    if not reasons:
        layer, capability = asked_of(candidate, format)
        name = select_kernel(kernel, layer, capability, caller="explain")
        multiples = get_kernel(name).size_multiples(layer, DEFAULT_HIDDEN_ALIGNMENT)
        padded = tuple(
            round_up(s, m)
            for s, m in zip((layer.hidden_size, layer.intermediate_size), multiples, strict=True)
        )
    notes = [f"this process gets {candidate.part(format)}"] if name and candidate.part else []
    if stored_activation_scales(candidate.module):
        notes.append("activation ranges are calibrated")
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
        format=None if reasons else format,
        padded_sizes=padded,
        kernel=name,
        nbytes=candidate.nbytes,
    )


def _fused_row(path: str, module: FusedExperts, router: FusedRouter | None) -> BlockReport:
    meta, prepared = module.metadata, module.prepared.operands
    notes = [f"it holds {part}" for part in module.parts]
    notes += [f"its router chooses in one launch ({router.routing.method})"] if router else []
    scales = module.activation_scales()
    stored = FORMATS[module.layer.format].activation_range is not None
    if stored and not prepared.hidden_scale.is_meta and all(bool((s == 1).all()) for s in scales):
        notes.append(
            "activation ranges are not calibrated (only kernels that round activations use them)"
        )
    _, hidden, columns = prepared.down_packed.shape
    return BlockReport(
        path=path,
        module=type(module).__name__,
        status="replaced",
        reasons=tuple(notes),
        activation=meta["activation"],
        gated=meta["gated"],
        num_experts=meta["num_experts"],
        top_k=router.routing.top_k if router else None,
        hidden_size=meta["hidden_size"],
        intermediate_size=meta["intermediate_size"],
        format=module.layer.format,
        padded_sizes=(hidden, FORMATS[module.layer.format].elements(columns)),
        kernel=module.kernel,
        nbytes=module.nbytes,
    )
