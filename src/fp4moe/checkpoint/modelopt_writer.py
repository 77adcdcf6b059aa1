"""ModelOpt's configuration of a checkpoint whose experts are NVFP4.

Source: the exports of nvidia-modelopt 0.47.0 that test_checkpoint_writer.py makes. What is
quantised, and its names: float_experts.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from ..formats import NVFP4
from ..version import __version__
from .float_experts import Experts, is_stack
from .header import Spec
from .mtp import mtp_module

__all__ = ["exclude_modules", "quantization_configs"]

# The version of ModelOpt whose layout this is.
LAYOUT_VERSION = "0.47.0"


def exclude_modules(
    shapes: Mapping[str, Spec], found: Iterable[Experts], layers: int | None = None
) -> list[str]:
    """Patterns of `fnmatch` for the modules that stay as they are.

    A module is whatever has a 2-D `weight`, or holds fused experts. As in ModelOpt's lists, a
    pattern is the shortest name that no quantised module shares, with a star where it stands for
    modules below it; but no number ends one, since `layers.1*` would take layers.10 along. Only
    behind the decoder's layers one does: no quantised layer has a higher number.

    Args:
        shapes: key -> (dtype, shape) of the checkpoint that is read.
        found: the experts that are quantised.
        layers: of the model's decoder, see `find_experts`.
    """
    parts = [part for layer in found for group in layer.groups() for part in group]
    names = [part.name for part in parts]
    sources = {part.source.removesuffix(".weight") for part in parts}
    shared = {".".join(path[:end]) for path in _paths(names) for end in range(1, len(path) + 1)}
    modules = {
        key.removesuffix(".weight")
        for key, (_, shape) in shapes.items()
        if (key.endswith(".weight") and len(shape) == 2) or is_stack(key, shape)
    }
    patterns = {"lm_head"}  # a tied one is not in the files, but other programs build it
    for path in _paths(modules - shared - sources):
        end, further = 1, mtp_module(".".join(path), layers)
        while end < len(path) and (
            (name := ".".join(path[:end])) in shared
            or (path[end - 1].isdigit() and name != further)
        ):
            end += 1
        patterns.add(".".join(path[:end]) + ("*" if end < len(path) else ""))
    wide = {p for p in patterns if p.endswith("*") and fnmatch.filter(names, p)}
    return sorted(patterns - wide | {p[:-1] + ".*" for p in wide})


def _paths(names: Iterable[str]) -> list[list[str]]:
    return [name.split(".") for name in names]


def quantization_configs(excluded: list[str], calibrated: bool) -> tuple[dict[str, Any], ...]:
    """Return hf_quant_config.json, and "quantization_config" for config.json."""
    # Loaders such as TensorRT-LLM's ask for this producer: here it is the name of the layout.
    producer = {
        "name": "modelopt",
        "version": LAYOUT_VERSION,
        "written_by": f"fp4moe {__version__}",
    }
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.block_size}
    group: dict[str, Any] = {"input_activations": numbers} if calibrated else {}
    algorithm = "NVFP4" if calibrated else "W4A16_NVFP4"
    legacy = {
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.block_size,
            "exclude_modules": excluded,
        },
    }
    current = {
        "config_groups": {"group_0": group | {"weights": numbers, "targets": ["Linear"]}},
        "ignore": excluded,
        "quant_algo": algorithm,
        "producer": producer,
        "quant_method": "modelopt",
    }
    return legacy, current
