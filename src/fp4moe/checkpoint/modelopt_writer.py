"""How ModelOpt names the experts of a checkpoint, and how a float checkpoint stores them.

Source of the names: the exports of nvidia-modelopt 0.47.0 that test_checkpoint_writer.py makes. A
fused tensor is split into experts.<id>.<projection>; names that are per expert already stay as they
are. Each gets .weight, .weight_scale, .weight_scale_2 and, calibrated, .input_scale.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedError, must
from ..formats import NVFP4
from ..version import __version__
from .header import Spec, name_keys
from .mtp import mtp_module

__all__ = ["Experts", "Part", "exclude_modules", "find_experts", "quantization_configs"]

FUSED = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<name>gate_up_proj|up_proj|down_proj)")
SINGLE = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<expert>[0-9]{1,9})\.(?P<name>\w+)\.weight")
INSIDE = re.compile(r"(?P<module>(?:.*\.)?experts)\..*")
# What files call the three projections; w1 to w3 are Mixtral's names.
ROLES = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Granite-MoE's own [E, 2 I, H] and [E, H, I]; split, programs know them by Mixtral's names.
GRANITE = re.compile(
    r"(?P<module>(?:.*\.)?block_sparse_moe)\.(?P<name>input|output)_linear\.weight"
)
# The version of ModelOpt whose layout this is.
LAYOUT_VERSION = "0.47.0"


@dataclasses.dataclass(frozen=True)
class Part:
    """One projection of one expert: what to read, and the name under which it is written.

    Attributes:
        name: module in the written checkpoint, such as model.layers.0.experts.3.gate_proj.
        source: key in the checkpoint that is read.
        place: index into that tensor; () for all of it.
        shape: (rows, columns) of the weight.
        expert: number of the expert.
    """

    name: str
    source: str
    place: tuple[int | slice, ...]
    shape: tuple[int, int]
    expert: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        module: name up to and with "experts".
        count: number of experts.
        first: per expert, the parts that share a global scale: (gate, up), or (up,).
        down: per expert, its down projection.
    """

    module: str
    count: int
    first: list[tuple[Part, ...]]
    down: list[Part]

    def groups(self) -> list[tuple[Part, ...]]:
        """The parts of all experts, those with a common global scale together."""
        return [*self.first, *((part,) for part in self.down)]


def find_experts(
    shapes: Mapping[str, Spec], patterns: Collection[str] | None, layers: int | None = None
) -> tuple[list[Experts], list[str]]:
    """Return the experts layers that are to be quantised, in the order of their first key.

    Args:
        shapes: key -> (dtype, shape) of the whole checkpoint.
        patterns: regular expressions; a layer is taken where one is found in its module name.
            None takes all but those of multi-token prediction (mtp.py), as ModelOpt does.
        layers: of the model's decoder; what is numbered behind them is multi-token prediction's.

    Returns:
        The layers, and the names of those of multi-token prediction that were left out.

    Raises:
        UnsupportedError: there are none, or they are stored in a way that is not known here.
        CheckpointError: some of an experts layer is missing or its shapes do not fit.
    """
    inside: dict[str, list[str]] = {}
    for key, (_, shape) in shapes.items():
        if match := INSIDE.fullmatch(key):
            inside.setdefault(match["module"], []).append(key)
        elif (match := GRANITE.fullmatch(key)) and len(shape) == 3:
            inside.setdefault(f"{match['module']}.experts", []).append(key)
    if not inside:
        must(
            "quantize_checkpoint: src",
            "hold experts under names that are known",
            f"none in {len(shapes)} tensors",
            "Known are <layer>.experts.gate_up_proj (or up_proj) and down_proj, "
            "<layer>.experts.<number>.<projection>.weight, and Granite's "
            "block_sparse_moe.input_linear.",
            error=UnsupportedError,
        )
    if patterns is None:
        taken = [name for name in inside if mtp_module(name, layers) is None]
        left = [name for name in inside if name not in taken]
    else:
        taken = [name for name in inside if any(re.search(p, name) for p in patterns)]
        left = []
    if not taken:
        got = f"{name_keys(inside)} with layers={patterns}"
        must(
            "quantize_checkpoint: layers",
            "choose modules whose name ends in experts",
            got,
            "Pass other patterns.",
            error=UnsupportedError,
        )
    return [_read_layer(name, inside[name], shapes) for name in taken], left


def _read_layer(module: str, keys: list[str], shapes: Mapping[str, Spec]) -> Experts:
    fused = {match["name"]: key for key in keys if (match := FUSED.fullmatch(key))}
    granite = {match["name"]: key for key in keys if (match := GRANITE.fullmatch(key))}
    single = [match for key in keys if (match := SINGLE.fullmatch(key)) and match["name"] in ROLES]
    unknown = set(keys) - {*fused.values(), *granite.values()} - {match[0] for match in single}
    floats = {key for key in keys if shapes[key][0] in FLOATS}
    if unknown or floats != set(keys) or sum(map(bool, (fused, granite, single))) > 1:
        got = name_keys(unknown or set(keys) - floats or set(keys))
        must(
            f"quantize_checkpoint: {module}",
            "hold gate, up and down projections in bfloat16, float16 or float32 and nothing else",
            got,
            "Leave this layer out with layers=.",
            error=UnsupportedError,
        )
    if fused:
        first = "gate_up_proj" if "gate_up_proj" in fused else "up_proj"
        names = ("gate_proj", "up_proj") if first == "gate_up_proj" else ("up_proj",)
        layer = _read_fused(module, fused, shapes, (first, "down_proj"), (*names, "down_proj"))
    elif granite:
        layer = _read_fused(module, granite, shapes, ("input", "output"), ("w1", "w3", "w2"))
    else:
        layer = _read_single(module, single, shapes)
    parts = [part for group in layer.groups() for part in group]
    if uneven := {part.name for part in parts if part.shape[1] % NVFP4.block_size}:
        must(
            f"quantize_checkpoint: the columns of {module}",
            f"be multiples of {NVFP4.block_size}",
            f"others in {name_keys(uneven)}",
            "Leave this layer out with layers=; replace_moe pads such layers.",
            error=UnsupportedError,
        )
    return layer


def _read_fused(
    module: str,
    fused: dict[str, str],
    shapes: Mapping[str, Spec],
    stacks: tuple[str, str],
    names: tuple[str, ...],
) -> Experts:
    """[E, 2 I, H] or [E, I, H], and [E, H, I]; gate rows before up rows.

    Args:
        fused: stack -> key.
        stacks: what these two stacks are called.
        names: what their projections are called when written: (gate,) up, down.
    """
    sizes = {name: shapes[key][1] for name, key in fused.items()}
    (first, second), gates = stacks, len(names) - 1
    if set(sizes) != set(stacks):
        _incomplete(module, f"{name_keys(fused.values())}")
    down = sizes[second]
    wanted = (down[0], gates * down[2], down[1]) if len(down) == 3 else None
    if sizes[first] != wanted or 0 in down:
        must(
            f"quantize_checkpoint: {module}",
            f"hold {first} [E, {'2 * ' * (gates - 1)}I, H] and {second} [E, H, I]",
            sizes,
            "Leave this layer out with layers=.",
            error=UnsupportedError,
        )
    count, hidden, intermediate = down
    layer = Experts(module, count, [], [])
    for expert in range(count):
        rows = [slice(i * intermediate, (i + 1) * intermediate) for i in range(gates)]
        layer.first.append(
            tuple(
                Part(
                    f"{module}.{expert}.{name}",
                    fused[first],
                    (expert, place),
                    (intermediate, hidden),
                    expert,
                )
                for name, place in zip(names[:-1], rows, strict=True)
            )
        )
        name, shape = f"{module}.{expert}.{names[-1]}", (hidden, intermediate)
        layer.down.append(Part(name, fused[second], (expert,), shape, expert))
    return layer


def _read_single(
    module: str, matches: Iterable[re.Match[str]], shapes: Mapping[str, Spec]
) -> Experts:
    """One tensor per expert and projection: [I, H], [I, H], [H, I]."""
    found: dict[int, dict[str, str]] = {}
    for match in matches:
        keys_of = found.setdefault(int(match["expert"]), {})
        if keys_of.setdefault(ROLES[match["name"]], match[0]) != match[0]:
            _incomplete(module, f"two names of one projection, such as {match[0]!r}")
    roles = set(found.get(0, {}))
    incomplete = {f"{module}.{expert}" for expert in found if set(found[expert]) != roles}
    if sorted(found) != list(range(len(found))) or incomplete or not {"up", "down"} <= roles:
        got = name_keys(incomplete or {f"{module}.{expert}" for expert in found})
        _incomplete(module, got)
    up = shapes[found[0]["up"]][1]
    rows, columns = up if len(up) == 2 else (0, 0)
    wanted = {"gate": (rows, columns), "up": (rows, columns), "down": (columns, rows)}
    keys = [(role, key) for parts in found.values() for role, key in parts.items()]
    wrong = {key for role, key in keys if shapes[key][1] != wanted[role] or not rows * columns}
    if wrong:
        must(
            f"quantize_checkpoint: {module}",
            "have gate and up [I, H] and down [H, I] of one size",
            f"others in {name_keys(wrong)}",
            "Download it again.",
            error=CheckpointError,
        )
    layer = Experts(module, len(found), [], [])
    for expert in range(len(found)):
        parts = {
            role: Part(key.removesuffix(".weight"), key, (), wanted[role], expert)
            for role, key in sorted(found[expert].items())
        }
        layer.down.append(parts.pop("down"))
        layer.first.append(tuple(parts.values()))
    return layer


def _incomplete(module: str, got: str) -> None:
    must(
        f"quantize_checkpoint: {module}",
        "have up and down, with or without gate, of every expert from 0 on",
        got,
        "Download it again.",
        error=CheckpointError,
    )


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
        if (key.endswith(".weight") and len(shape) == 2)
        or FUSED.fullmatch(key)
        or (GRANITE.fullmatch(key) and len(shape) == 3)
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
