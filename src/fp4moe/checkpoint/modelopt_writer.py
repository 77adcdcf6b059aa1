"""ModelOpt's layout of a checkpoint whose experts are quantised, and its configuration.

Source: the exports of nvidia-modelopt 0.47.0 that test_checkpoint_writer.py makes. What is
quantised, and its names: float_experts.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..experts import ExpertWeights
from ..formats import FORMATS, StoredMatrix
from ..version import __version__
from .float_experts import Experts, FloatMatrix, is_stack
from .header import Spec
from .modelopt import MODELOPT_NAMES, ROWS, WEIGHTS_ONLY
from .mtp import mtp_module
from .stored import needed_parts

__all__ = ["exclude_modules", "mixed_configs", "quantization_configs", "written"]
__all__ += ["written_experts", "written_scale", "written_specs"]

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
        layers: of the model's decoder, see `find_float_experts`.
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


def written_specs(
    name: str, shape: tuple[int, int], form: str, *, calibrated: bool
) -> dict[str, Spec]:
    """Return what is written for one matrix: key -> (dtype, shape).

    Args:
        name: of its module.
        shape: (rows, columns). form: its format. calibrated: with an input_scale.
    """
    format, names = FORMATS[form], MODELOPT_NAMES[form]
    specs = {
        f"{name}.{names[part]}": (dtype, _shape(form, part, size[1:]))
        for part, (dtype, size) in format.shapes(1, *shape).items()
        if part in needed_parts(format)
    }
    if calibrated:
        specs[f"{name}.{names['input_scale']}"] = (torch.float32, ())
    return specs


def written(name: str, stored: StoredMatrix, form: str) -> list[tuple[str, torch.Tensor]]:
    """Return the keys and tensors of one quantised matrix [rows, columns]."""
    return [
        (f"{name}.{MODELOPT_NAMES[form][part]}", tensor.reshape(_shape(form, part, tensor.shape)))
        for part, tensor in stored.parts().items()
        if part in needed_parts(FORMATS[form])
    ]


def written_scale(name: str, scale: float, form: str) -> tuple[str, torch.Tensor]:
    """Return the key and tensor of the static scale of a matrix's input."""
    value = torch.tensor(scale, dtype=torch.float32, device="cpu")
    return f"{name}.{MODELOPT_NAMES[form]['input_scale']}", value


def written_experts(
    layer: Experts,
    weights: ExpertWeights,
    biases: Collection[str],
    dtype: torch.dtype,
    *,
    calibrated: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the keys and tensors of packed experts, copies in the memory of the host.

    Args:
        layer: how the float checkpoint of the same model names them.
        weights: all experts of the layer, without padding.
        biases: keys of those that the float checkpoint has.
        dtype: of biases, where that keeps their values; else they are float32.
        calibrated: with an input_scale for each.
    """
    weights, form = weights.to("cpu"), weights.format
    hidden, inner = float(weights.hidden_scale), weights.intermediate_scale.tolist()
    # The matrices of a part lie below each other: gate, then up.
    for gemm, bias, groups in (
        (weights.gate_up, weights.gate_up_bias, layer.first),
        (weights.down, weights.down_bias, [(part,) for part in layer.down]),
    ):
        for parts in groups:
            for place, part in enumerate(parts):
                matrix = _one(gemm, part, place, len(parts))
                yield from written(part.name, matrix, form)
                if calibrated:
                    scale = hidden if gemm is weights.gate_up else inner[part.expert]
                    yield written_scale(part.name, scale, form)
                if bias is not None and (key := f"{part.name}.bias") in biases:
                    values = bias[part.expert].chunk(len(parts))[place]
                    cast = values.to(dtype, copy=True)
                    yield key, cast if torch.equal(cast.float(), values) else values.clone()


def _one(gemm: StoredMatrix, part: FloatMatrix, place: int, count: int) -> StoredMatrix:
    """A copy of one of the `count` matrices of an expert."""
    parts = {
        # A part of size 0 is absent; a global scale is one number for all of them.
        name: (t if t.ndim == 1 else t.chunk(count, 1)[place])[part.expert].clone()
        if t.numel()
        else t
        for name, t in gemm.parts().items()
    }
    return type(gemm)(**parts)


def _shape(form: str, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How ModelOpt writes a part: blocks have axes between their counts, rows have one axis."""
    scales = FORMATS[form].scales
    if part != "block_scale" or scales is None or scales.dtype != torch.float32:
        return tuple(shape)
    rows, columns = shape
    if rows * columns == 1 and scales.rows != 1:
        return ()
    return (rows,) if scales.columns is None else (rows, 1, columns, 1)


def quantization_configs(
    excluded: list[str], calibrated: bool, form: str
) -> tuple[dict[str, Any], ...]:
    """Return hf_quant_config.json, and "quantization_config" for config.json."""
    algorithm, size = _algorithm(form, calibrated), _group_size(form)
    group = _group(form, calibrated)
    # The other algorithms have no groups in its files.
    groups = {"config_groups": {"group_0": group | {"targets": ["Linear"]}}} if group else {}
    legacy = {"kv_cache_quant_algo": None, **size, "exclude_modules": excluded}
    return _configs(algorithm | legacy, {**groups, "ignore": excluded, **algorithm})


def mixed_configs(
    excluded: list[str], calibrated: Mapping[str, bool], layers: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    """Return the same for modules of several formats.

    Args:
        calibrated: format -> whether its matrices have an input_scale.
        layers: module -> its format; experts are one module a layer.
    """
    named = {
        name: _algorithm(form, calibrated[form]) | _group_size(form)
        for name, form in layers.items()
    }
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": named}
    groups = {}
    for number, form in enumerate(calibrated):
        targets = sorted(name for name, other in layers.items() if other == form)
        if group := _group(form, calibrated[form]):
            groups[f"group_{number}"] = group | {"targets": targets}
    legacy = {**mixed, "kv_cache_quant_algo": None, "exclude_modules": excluded}
    return _configs(legacy, {"config_groups": groups, "ignore": excluded, **mixed})


def _configs(legacy: dict[str, Any], current: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    # Loaders such as TensorRT-LLM's ask for this producer: here it is the name of the layout.
    producer = {
        "name": "modelopt",
        "version": LAYOUT_VERSION,
        "written_by": f"fp4moe {__version__}",
    }
    return (
        {"producer": producer, "quantization": legacy},
        {**current, "producer": producer, "quant_method": "modelopt"},
    )


def _algorithm(form: str, calibrated: bool) -> dict[str, Any]:
    weights_only = form == "nvfp4" and not calibrated
    return {"quant_algo": WEIGHTS_ONLY if weights_only else ROWS[form].algorithms[0]}


def _group_size(form: str) -> dict[str, Any]:
    size = ROWS[form].group_size
    return {} if size is None else {"group_size": size}


def _group(form: str, calibrated: bool) -> dict[str, Any]:
    """The numbers of a group of ModelOpt's; {} for a format without ranges of activations."""
    if "input_scale" not in ROWS[form].names:
        return {}
    bits = 8 // (FORMATS[form].codes.columns or 1)
    numbers = {"dynamic": False, "num_bits": bits, "type": "float", **_group_size(form)}
    return ({"input_activations": numbers} if calibrated else {}) | {"weights": numbers}
