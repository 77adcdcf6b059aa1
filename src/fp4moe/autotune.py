"""autotune: let FlashInfer's tuner measure its kernels on a model's layers, once, eagerly.

Do this before torch.compile or a CUDA-graph capture: the tuner launches and times kernels inside a
call. Not here: our own kernels, whose choice is a shipped table.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, ShapeError, UnsupportedError
from .kernels import current_capability
from .kernels.flashinfer_library import (
    CUBINS,
    flashinfer_settings,
    installed,
    library,
    set_flashinfer,
    tuning,
)
from .module import FusedExperts, RoutedExperts
from .version import __version__

__all__ = ["autotune", "cache_stamp"]

logger = logging.getLogger("fp4moe")
TUNED_KERNELS = ("flashinfer_trtllm", "flashinfer_cutlass")


def autotune(
    model: nn.Module, max_tokens: int = 8192, cache: str | os.PathLike | None = None
) -> int:
    """Tune FlashInfer's kernels for every distinct layer of the model.

    Args:
        model: a model with fused experts, or one `FusedExperts`.
        max_tokens: the largest batch; sizes up to the next power of two are measured, and
            `set_flashinfer(tune_max_num_tokens=...)` is set to it for this process.
        cache: where FlashInfer's choices are kept. Loaded if it is there, written at the end; a
            `.versions.json` beside it says which GPU and which versions it is valid for.

    Returns:
        The number of distinct layers that were tuned.

    Raises:
        UnsupportedError: the model has no layer on a FlashInfer kernel.
        ShapeError: max_tokens is below 1, or a layer does not know its top_k.
        CheckpointError: the cache was written for another GPU or other versions.
    """
    if max_tokens < 1:
        raise ShapeError(
            f"autotune: max_tokens must be at least 1; got {max_tokens}. Pass the largest batch."
        )
    layers = _distinct(model)
    unknown = [layer for layer in layers if layer.top_k is None]
    if unknown:
        raise ShapeError(
            "autotune: every layer must know its top_k; got FusedExperts with top_k=None. Pass "
            "top_k to FusedExperts."
        )
    if not layers:
        found = sorted({m.kernel for m in model.modules() if isinstance(m, FusedExperts)})
        raise UnsupportedError(
            "autotune: model must have fused experts on one of the kernels "
            f"{', '.join(TUNED_KERNELS)}; got {found or 'none that is fused'}. Call "
            "fp4moe.replace_moe(model) on a Blackwell GPU first."
        )
    path = None if cache is None else pathlib.Path(cache)
    if path is not None:
        _check_stamp(path, layers[0].gate_up_packed.device)
    tokens = 1 << (max_tokens - 1).bit_length()
    set_flashinfer(enable_pdl=flashinfer_settings().enable_pdl, tune_max_num_tokens=tokens)
    arguments = {} if path is None else {"cache": str(path)}
    with tuning(**arguments):
        for layer in layers:
            _run(layer, max_tokens)
    if path is not None:
        _stamp_file(path).write_text(json.dumps(cache_stamp(layers[0].gate_up_packed.device)))
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


def _distinct(model: nn.Module) -> list[FusedExperts]:
    """Return one of each kind of layer that the tuner tells apart."""
    kinds: dict[tuple, FusedExperts] = {}
    for module in model.modules():
        if isinstance(module, FusedExperts) and module.kernel in TUNED_KERNELS:
            shapes = tuple(tuple(operand.shape) for operand in module.prepared.operands)
            routing = module.routing if isinstance(module, RoutedExperts) else None
            kind = (module.kernel, module.metadata["activation"], shapes, routing, module.top_k)
            kinds.setdefault(kind, module)
    return list(kinds.values())


def _run(layer: FusedExperts, tokens: int) -> None:
    """Call the layer once on random tokens and balanced random experts."""
    device, experts = layer.gate_up_packed.device, layer.num_experts
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(
        tokens,
        layer.metadata["hidden_size"],
        generator=generator,
        device=device,
        dtype=torch.bfloat16,
    )
    scores = torch.rand(tokens, experts, generator=generator, device=device)
    if isinstance(layer, RoutedExperts):
        bias = scores.new_zeros(experts if layer.routing.method == "sigmoid_topk" else 0)
        layer(hidden, scores, bias)
        return
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
        raise CheckpointError(
            f"autotune: cache must have its {stamp.name} beside it; got none. Delete {path} to "
            "tune again."
        )
    saved, now = json.loads(stamp.read_text()), cache_stamp(device)
    wrong = [f"{k} {saved.get(k)} (now {now[k]})" for k in now if saved.get(k) != now[k]]
    if wrong:
        raise CheckpointError(
            f"autotune: cache must be of this GPU and these versions; got {', '.join(wrong)}. Pass "
            f"another path, or delete {path}."
        )
