"""autotune: let FlashInfer's tuner measure its kernels on a model's layers, once, eagerly.

Do this before torch.compile or a CUDA-graph capture: the tuner launches and times kernels inside a
call. Not here: our own kernels, whose choice is a shipped table.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, check_choice, must, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from ..kernels import Layer, choose_kernel, current_capability
from ..kernels.flashinfer.library import (
    CUBINS,
    flashinfer_settings,
    installed,
    library,
    set_flashinfer,
    tuning,
)
from ..module import FusedExperts
from ..padding import round_up
from ..testing import random_codes
from ..version import __version__
from .block import Candidate
from .replace import asked_of, find_candidates

__all__ = ["autotune", "cache_stamp"]

logger = logging.getLogger("fp4moe")
TUNED_KERNELS = ("flashinfer_trtllm", "flashinfer_trtllm_w4a16", "flashinfer_cutlass")
# 0.6.13's CUTLASS may be tuned to a sum in bfloat16 that no two runs share; this turns it off.
DETERMINISTIC = "use_fused_finalize"


def autotune(
    model: nn.Module,
    max_tokens: int = 8192,
    cache: str | os.PathLike | None = None,
    *,
    format: str = DEFAULT_FORMAT,
) -> int:
    """Tune FlashInfer's kernels for every distinct layer of the model.

    Args:
        model: a model with fused experts, one `FusedExperts`, or a float model that is about to be
            compiled with `fp4moe.backend`, for whose layers random ones of their sizes stand in.
        max_tokens: the largest batch; sizes up to the next power of two are measured, and
            `set_flashinfer(tune_max_num_tokens=...)` is set to it for this process.
        cache: where FlashInfer's choices are kept. Loaded if it is there, written at the end; a
            `.versions.json` beside it says which GPU and which versions it is valid for.
        format: what a float model's experts will be quantised to, as in `replace_moe`; fused
            experts have theirs.

    Returns:
        The number of distinct layers that were tuned.

    Raises:
        UnsupportedError: the model has no layer that a FlashInfer kernel runs on its device, or
            there is no such format.
        ShapeError: max_tokens is below 1, or a layer does not know its top_k.
        CheckpointError: the cache was written for another GPU or other versions.
    """
    if max_tokens < 1:
        must("autotune: max_tokens", "be at least 1", max_tokens, "Pass the largest batch.")
    check_choice("format", format, FORMATS, caller="autotune")
    layers = _distinct(model) or _stand_ins(model, format)
    unknown = [layer for layer in layers if layer.top_k is None]
    if unknown:
        got = "FusedExperts with top_k=None"
        must("autotune: every layer", "know its top_k", got, "Pass top_k to FusedExperts.")
    if not layers:
        found = sorted({m.kernel for m in model.modules() if isinstance(m, FusedExperts)})
        refuse(
            "autotune",
            f"{type(model).__name__} cannot be tuned",
            f"its experts have the kernels {found or 'none'}, and "
            f"only {', '.join(TUNED_KERNELS)} are tuned",
            "Move the model to a Blackwell GPU, see fp4moe.explain(model); flashinfer_cutlass "
            "needs FlashInfer 0.6.15 or newer.",
        )
    path = None if cache is None else pathlib.Path(cache)
    if path is not None:
        _check_stamp(path, layers[0].prepared_gate_up_packed.device)
    tokens = 1 << (max_tokens - 1).bit_length()
    set_flashinfer(enable_pdl=flashinfer_settings().enable_pdl, tune_max_num_tokens=tokens)
    arguments = {} if path is None else {"cache": str(path)}
    with tuning(**arguments):
        for layer in layers:
            _run(layer, max_tokens)
    if path is not None:
        _stamp_file(path).write_text(
            json.dumps(cache_stamp(layers[0].prepared_gate_up_packed.device))
        )
    logger.info("autotune: %d distinct layers, up to %d tokens", len(layers), tokens)
    return len(layers)


def cache_stamp(device: torch.device) -> dict[str, Any]:
    """Return what a cache of tuned choices is valid for, as plain JSON values."""
    capability = current_capability(device)
    return {
        "fp4moe": __version__,
        "flashinfer-python": library().version,
        "flashinfer-cubin": installed(CUBINS),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "capability": list(capability) if capability else None,
    }


def _is_tuned(kernel: str | None) -> bool:
    if kernel == "flashinfer_cutlass":
        return DETERMINISTIC in library().arguments["cutlass_fused_moe"]
    return kernel in TUNED_KERNELS


def _distinct(model: nn.Module) -> list[FusedExperts]:
    """Return one of each kind of layer that the tuner tells apart."""
    kinds: dict[tuple, FusedExperts] = {}
    for module in model.modules():
        if isinstance(module, FusedExperts) and _is_tuned(module.kernel):
            shapes = tuple(tuple(operand.shape) for operand in module.prepared.operands.flat())
            form = module.layer.format, module.metadata["activation"]
            kind = (module.kernel, *form, shapes, module.top_k)
            kinds.setdefault(kind, module)
    return list(kinds.values())


def _stand_ins(model: nn.Module, format: str) -> list[FusedExperts]:
    """Return one random layer for each size of experts that are not fused yet."""
    kinds: dict[Layer, Candidate] = {}
    for candidate in find_candidates(model):
        if not candidate.reasons:
            kinds.setdefault(asked_of(candidate, format)[0], candidate)
    layers = []
    for asked, candidate in kinds.items():
        device = next(iter(candidate.parameters.values())).device
        capability = current_capability(device)
        if _is_tuned(choose_kernel("auto", asked, capability)[0]):
            # The kernel sees padded sizes, and the tuner's times do not depend on the values.
            hidden, inner = (
                round_up(size, FORMATS[asked.format].multiple)
                for size in (asked.hidden_size, asked.intermediate_size)
            )
            asked = dataclasses.replace(asked, hidden_size=hidden, intermediate_size=inner)
            layers.append(FusedExperts(random_codes(asked, device), top_k=candidate.top_k))
    return layers


def _run(layer: FusedExperts, tokens: int) -> None:
    """Call the layer once on random tokens and balanced random experts."""
    device, experts = layer.prepared_gate_up_packed.device, layer.num_experts
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(
        tokens,
        layer.layer.hidden_size,
        generator=generator,
        device=device,
        dtype=torch.bfloat16,
    )
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float32, device=device)
    assert layer.top_k is not None
    weights, ids = scores.topk(layer.top_k, dim=-1)
    layer(hidden, ids, weights)


def _stamp_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.versions.json")


def _check_stamp(path: pathlib.Path, device: torch.device) -> None:
    stamp = _stamp_file(path)
    if not path.exists():
        return
    if not stamp.exists():
        rule = f"have its {stamp.name} beside it"
        got = "none"
        must("autotune: cache", rule, got, f"Delete {path} to tune again.", error=CheckpointError)
    saved, now = json.loads(stamp.read_text()), cache_stamp(device)
    wrong = [f"{k} {saved.get(k)} (now {now[k]})" for k in now if saved.get(k) != now[k]]
    if wrong:
        rule = "be of this GPU and these versions"
        advice = f"Pass another path, or delete {path}."
        must("autotune: cache", rule, ", ".join(wrong), advice, error=CheckpointError)
