"""How a float checkpoint stores the experts of a layer, and the names that they are written under.

Source of the names: the exports of nvidia-modelopt 0.47.0 that test_checkpoint_writer.py makes. A
stack is split into experts.<id>.<projection>, a bias is .bias; names per expert stay as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import torch

from ..errors import CheckpointError, UnsupportedError, must, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from .header import Spec, name_keys
from .mtp import mtp_module, plain_name

__all__ = ["Bias", "Experts", "FloatMatrix", "Storages", "find_float_experts", "is_stack"]

SINGLE = re.compile(
    r"(?P<module>(?:.*\.)?experts)\.(?P<expert>[0-9]{1,9})\.(?P<name>\w+)\.(?P<leaf>weight|bias)"
)
INSIDE = re.compile(r"(?P<module>(?:.*\.)?experts)\..*")
# What files call the three projections; w1 to w3 are Mixtral's names.
ROLES = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Module of the model -> (layout, transposed) of its stacks, as in ExpertWeights.quantize.
Storages = Mapping[str, tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to stack all experts of a layer.

    Attributes:
        pattern: of keys, with the groups module and name.
        module: what is written behind the group module, if that is not the experts module itself.
        projections: stack -> what its parts are called when written; down last.
        layout: of the rows of gate and up; None for that of the model's class.
    """

    pattern: re.Pattern[str]
    projections: Mapping[str, tuple[str, ...]]
    layout: str | None = "gate_up"
    module: str = ""


def _way(pattern: str, projections: Mapping[str, tuple[str, ...]], **options: str | None) -> Way:
    return Way(re.compile(pattern), projections, **options)  # type: ignore[arg-type]


PAIR, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
EXPERTS = r"(?P<module>(?:.*\.)?experts)"
WAYS = (
    _way(
        rf"{EXPERTS}\.(?P<name>gate_up_proj|down_proj)",
        {"gate_up_proj": PAIR, "down_proj": DOWN},
        layout=None,
    ),
    _way(
        rf"{EXPERTS}\.(?P<name>up_proj|down_proj)",
        {"up_proj": PAIR[1:], "down_proj": DOWN},
        layout=None,
    ),
    # Granite-MoE's; split, programs know them by Mixtral's names.
    _way(
        r"(?P<module>(?:.*\.)?block_sparse_moe)\.(?P<name>input|output)_linear\.weight",
        {"input": ("w1", "w3"), "output": ("w2",)},
        module=".experts",
    ),
    # Inkling's, a gate row and an up row in turn.
    _way(
        rf"{EXPERTS}\.(?P<name>w13|w2)_weight",
        {"w13": PAIR, "w2": DOWN},
        layout="gate_up_interleaved",
    ),
    # Step's.
    _way(
        r"(?P<module>(?:.*\.)?)moe\.(?P<name>gate_proj|up_proj|down_proj)\.weight",
        {"gate_proj": PAIR[:1], "up_proj": PAIR[1:], "down_proj": DOWN},
        module="mlp.experts",
    ),
)
BIAS = "_bias"


@dataclasses.dataclass(frozen=True)
class FloatMatrix:
    """One projection of one expert: what to read, and the name under which it is written.

    Attributes:
        name: module in the written checkpoint, such as model.layers.0.experts.3.gate_proj.
        source: key in the checkpoint that is read.
        place: index into that tensor; () for all of it.
        shape: (rows, columns) of the weight.
        expert: number of the expert.
        transposed: whether it is stored as [columns, rows].
    """

    name: str
    source: str
    place: tuple[int | slice, ...]
    shape: tuple[int, int]
    expert: int
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Bias:
    """One bias of one expert, cut out of a stack: as FloatMatrix, with its number of values."""

    name: str
    source: str
    place: tuple[int | slice, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        module: name up to and with "experts".
        count: number of experts.
        first: per expert, the parts that share a global scale: (gate, up), or (up,).
        down: per expert, its down projection.
        biases: what is cut out of stacks; those of an expert of its own are copied.
    """

    module: str
    count: int
    first: list[tuple[FloatMatrix, ...]]
    down: list[FloatMatrix]
    biases: list[Bias] = dataclasses.field(default_factory=list)

    def groups(self) -> list[tuple[FloatMatrix, ...]]:
        """The parts of all experts, those with a common global scale together."""
        return [*self.first, *((part,) for part in self.down)]


def is_stack(key: str, shape: Sequence[int]) -> bool:
    """Whether a key holds one projection of all experts."""
    return len(shape) == 3 and any(way.pattern.fullmatch(key) for way in WAYS)


def _module_of(key: str, shape: Sequence[int]) -> str | None:
    """The experts module that a key belongs to, as it is written."""
    if match := INSIDE.fullmatch(key):
        return match["module"]
    for way in WAYS:
        if len(shape) == 3 and (match := way.pattern.fullmatch(key)):
            return match["module"] + way.module
    return None


def find_float_experts(
    shapes: Mapping[str, Spec],
    patterns: Collection[str] | None,
    layers: int | None = None,
    storages: Storages | None = None,
    form: str = DEFAULT_FORMAT,
) -> tuple[list[Experts], list[str]]:
    """Return the experts layers that are to be quantised, in the order of their first key.

    Args:
        shapes: key -> (dtype, shape) of the whole checkpoint.
        patterns: regular expressions; a layer is taken where one is found in its module name.
            None takes all but those of multi-token prediction (mtp.py), as ModelOpt does.
        layers: of the model's decoder; what is numbered behind them is multi-token prediction's.
        storages: how the model's class stacks them; None where it is not known: gate rows first,
            [E, out, in].
        form: the format that they are to have; its blocks must fit their columns.

    Returns:
        The layers, and the names of those of multi-token prediction that were left out.

    Raises:
        UnsupportedError: there are none, or they are stored in a way that is not known here.
        CheckpointError: some of an experts layer is missing or its shapes do not fit.
    """
    inside: dict[str, list[str]] = {}
    for key, (_, shape) in shapes.items():
        if (module := _module_of(key, shape)) is not None:
            inside.setdefault(module, []).append(key)
    if not inside:
        refuse(
            "quantize_checkpoint",
            "no experts of src can be quantised",
            f"none of its {len(shapes)} tensors bears a known name",
            "Known are <layer>.experts.gate_up_proj (or up_proj) and down_proj, "
            "<layer>.experts.<number>.<projection>.weight, Granite's "
            "block_sparse_moe.input_linear, Inkling's experts.w13_weight and Step's moe.up_proj.",
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
    ways = {name: _storage(name, storages or {}) for name in taken}
    multiple = FORMATS[form].multiple
    return [_read_layer(name, inside[name], shapes, ways[name], multiple) for name in taken], left


def _storage(module: str, storages: Storages) -> tuple[str, bool]:
    """How the class stacks the experts of a layer; all layers of a class do alike."""
    by_name = {plain_name(path): way for path, way in storages.items()}
    ways = set(storages.values()) or {("gate_up", False)}
    way = by_name.get(plain_name(module)) or (ways.pop() if len(ways) == 1 else None)
    if way is None:
        refuse(
            "quantize_checkpoint",
            f"{module} cannot be quantised",
            f"the model's class has experts modules of {len(storages or {})} names, and this is "
            "none of them",
            "Leave this layer out with layers=.",
        )
    return way


def _read_layer(
    module: str,
    keys: list[str],
    shapes: Mapping[str, Spec],
    storage: tuple[str, bool],
    multiple: int,
) -> Experts:
    stacked = [
        (way, {match["name"]: key for key in keys if (match := way.pattern.fullmatch(key))})
        for way in WAYS
    ]
    # Two of them know down_proj.
    found, own = max(stacked, key=lambda pair: len(pair[1]))
    biases = {name: key for name, source in own.items() if (key := source + BIAS) in keys}
    single = [match for key in keys if (match := SINGLE.fullmatch(key)) and match["name"] in ROLES]
    unknown = set(keys) - {*own.values(), *biases.values()} - {match[0] for match in single}
    floats = {key for key in keys if shapes[key][0] in FLOATS}
    if unknown or floats != set(keys) or (own and single):
        got = name_keys(unknown or set(keys) - floats or set(keys))
        refuse(
            "quantize_checkpoint",
            f"{module} cannot be quantised",
            "it holds more than gate, up and down projections in bfloat16, float16 or float32 "
            "and their biases: " + got,
            "Leave this layer out with layers=.",
        )
    if own:
        if set(own) != set(found.projections):
            _incomplete(module, name_keys(own.values()))
        if biases and set(biases) != set(own):
            must(
                f"quantize_checkpoint: {module}",
                "have a bias for every stack or for none",
                name_keys(biases.values()),
                "Download it again.",
                error=CheckpointError,
            )
        layer = _read_stacks(module, found, own, biases, shapes, storage)
    else:
        layer = _read_single(module, single, shapes)
    parts = [part for group in layer.groups() for part in group]
    if uneven := {part.name for part in parts if part.shape[1] % multiple}:
        refuse(
            "quantize_checkpoint",
            f"{module} cannot be quantised",
            f"its columns are no multiples of {multiple} in {name_keys(uneven)}",
            "Leave this layer out with layers=; replace_moe pads such layers.",
        )
    return layer


def _read_stacks(
    module: str,
    way: Way,
    keys: Mapping[str, str],
    biases: Mapping[str, str],
    shapes: Mapping[str, Spec],
    storage: tuple[str, bool],
) -> Experts:
    """All experts in one tensor a projection, or for gate and up together.

    Args:
        keys, biases: stack -> key.
        storage: layout and orientation of the model's class.
    """
    layout, transposed = storage if way.layout is None else (way.layout, False)
    sizes = {name: shapes[key][1] for name, key in keys.items()}
    *firsts, second = way.projections
    down = sizes[second]
    count, hidden, intermediate = (0, 0, 0)
    if len(down) == 3:
        count, hidden, intermediate = (down[0], *(down[:0:-1] if transposed else down[1:]))
    rows = {name: len(way.projections[name]) * intermediate for name in firsts}
    wanted: dict[str, tuple[int, ...]] = {
        name: (count, hidden, r) if transposed else (count, r, hidden) for name, r in rows.items()
    } | {second: down}
    wanted_biases = {name: (count, rows.get(name, hidden)) for name in biases}
    found_biases = {name: shapes[key][1] for name, key in biases.items()}
    if sizes != wanted or 0 in down or found_biases != wanted_biases:
        words = [f"{name} [E, {'2 * ' * (len(way.projections[name]) - 1)}I, H]" for name in firsts]
        shown = sizes | {f"{name}{BIAS}": shape for name, shape in found_biases.items()}
        refuse(
            "quantize_checkpoint",
            f"{module} cannot be quantised",
            f"it does not hold {', '.join(words)} and {second} [E, H, I]"
            + " with the last two axes exchanged" * transposed
            + f", but {shown}",
            "Leave this layer out with layers=.",
        )
    layer = Experts(module, count, [], [])

    def place(expert: int, index: int, parts: int) -> tuple[int | slice, ...]:
        if parts == 1:
            return (expert,)
        if layout == "gate_up_interleaved":
            return expert, slice(index, None, 2)
        return expert, slice(index * intermediate, (index + 1) * intermediate)

    def cut(expert: int, stack: str) -> list[FloatMatrix]:
        names = way.projections[stack]
        shape = (hidden, intermediate) if stack == second else (intermediate, hidden)
        found = []
        for index, name in enumerate(names):
            where, path = place(expert, index, len(names)), f"{module}.{expert}.{name}"
            if stack in biases:
                layer.biases.append(Bias(f"{path}.bias", biases[stack], where, shape[0]))
            if transposed and len(where) == 2:
                where = where[0], slice(None), where[1]
            found.append(FloatMatrix(path, keys[stack], where, shape, expert, transposed))
        return found

    for expert in range(count):
        layer.first.append(tuple(part for stack in firsts for part in cut(expert, stack)))
        layer.down.extend(cut(expert, second))
    return layer


def _read_single(
    module: str, matches: Sequence[re.Match[str]], shapes: Mapping[str, Spec]
) -> Experts:
    """One tensor per expert and projection: [I, H], [I, H], [H, I]."""
    found: dict[int, dict[str, str]] = {}
    biases = [match for match in matches if match["leaf"] == "bias"]
    for match in (match for match in matches if match["leaf"] == "weight"):
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
    wrong |= {m[0] for m in biases if shapes[m[0]][1] != wanted[ROLES[m["name"]]][:1]}
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
            role: FloatMatrix(key.removesuffix(".weight"), key, (), wanted[role], expert)
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
