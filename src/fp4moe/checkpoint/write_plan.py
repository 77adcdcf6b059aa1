"""What a quantised checkpoint will hold, file by file.

Everything but the values follows from the headers of the source: keys, shapes, files, bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from ..errors import must
from ..formats import FORMATS
from .files import WEIGHTS, CheckpointFiles
from .float_experts import Bias, Experts, FloatMatrix
from .header import Spec, name_keys
from .modelopt_writer import written_specs
from .mtp import plain_name
from .safetensors_writer import ShardLayout

__all__ = [
    "Calibration",
    "Shard",
    "Step",
    "input_scales",
    "plan_shards",
    "quantized_bytes",
    "read_bytes",
]

Calibration = Mapping[str, tuple[float, float | Sequence[float]]]
# What is read and written together: a key that is copied, a bias that is cut out of a stack, or
# parts that share a global scale.
Step = str | Bias | tuple[FloatMatrix, ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to be written, its steps in the order of reading, and the bytes they read."""

    layout: ShardLayout
    steps: list[Step]
    source_bytes: int


def plan_shards(
    files: CheckpointFiles,
    found: Sequence[Experts],
    scales: Mapping[str, float],
    max_shard_bytes: int,
    form: str,
) -> list[Shard]:
    """Cut the work into files, in the order of the source's files; form: of the experts."""
    groups: list[list[Step]] = [[]]
    specs: list[dict[str, Spec]] = [{}]
    size = 0
    for step in _steps(files, found):
        produced = _produced(step, files.shapes, scales, form)
        count = sum(_nbytes(spec) for spec in produced.values())
        if groups[-1] and size + count > max_shard_bytes:
            groups.append([])
            specs.append({})
            size = 0
        groups[-1].append(step)
        specs[-1] |= produced
        size += count
    total = len(groups)
    names = [f"model-{number + 1:05}-of-{total:05}.safetensors" for number in range(total)]
    return [
        Shard(
            ShardLayout.of(WEIGHTS if total == 1 else name, spec),
            steps,
            sum(read_bytes(step, files.shapes) for step in steps),
        )
        for name, spec, steps in zip(names, specs, groups, strict=True)
    ]


def input_scales(
    found: Sequence[Experts], calibration: Calibration | None, form: str
) -> dict[str, float]:
    """The input_scale of every quantised module by its written name; empty when uncalibrated.

    Raises:
        ShapeError: a layer has none or several, or its numbers do not fit.
    """
    if calibration is None:
        return {}
    given: dict[str, list[str]] = {}
    for name in calibration:
        given.setdefault(plain_name(name), []).append(name)
    scales: dict[str, float] = {}
    for layer in found:
        names = given.get(plain_name(layer.module), [])
        if len(names) != 1:
            must(
                "quantize_checkpoint: calibration",
                f"have one entry for {layer.module}",
                f"{names} of {name_keys(calibration)}",
                "Calibrate it, or leave the layer out with layers=.",
            )
        hidden, intermediate = calibration[names[0]]
        each = [intermediate] if isinstance(intermediate, (int, float)) else list(intermediate)
        each = each * layer.count if len(each) == 1 else each
        numbers = [hidden, *each]
        if len(each) != layer.count or not all(0 < n < math.inf for n in numbers):
            must(
                f"quantize_checkpoint: calibration of {layer.module}",
                f"be positive and finite, one number and one or {layer.count}",
                f"{len(each)} in the second place, from {min(numbers)} to {max(numbers)}",
                f"Pass amax / {FORMATS[form].activation_range:g}.",
            )
        scales |= {part.name: float(hidden) for parts in layer.first for part in parts}
        scales |= {part.name: float(each[part.expert]) for part in layer.down}
    return scales


def _steps(files: CheckpointFiles, found: Sequence[Experts]) -> Iterator[Step]:
    of_key: dict[str, list[tuple[FloatMatrix, ...]]] = {}
    biases: dict[str, list[Bias]] = {}
    for layer in found:
        for bias in layer.biases:
            biases.setdefault(bias.source, []).append(bias)
        for parts in layer.groups():
            for source in {part.source for part in parts}:
                of_key.setdefault(source, []).append(parts)
    done: set[str] = set()
    for key in files.shapes:
        if key not in of_key and key not in biases:
            yield key
        yield from biases.get(key, ())
        for parts in of_key.get(key, ()):
            # A gate and an up of their own keys are one step, at the first of the two.
            if parts[0].name not in done:
                done.add(parts[0].name)
                yield parts


def _produced(
    step: Step, shapes: Mapping[str, Spec], scales: Mapping[str, float], form: str
) -> dict[str, Spec]:
    """The keys that a step writes in a format."""
    if isinstance(step, str):
        return {step: shapes[step]}
    if isinstance(step, Bias):
        return {step.name: (shapes[step.source][0], (step.size,))}
    produced: dict[str, Spec] = {}
    for part in step:
        produced |= written_specs(part.name, part.shape, form, calibrated=bool(scales))
    return produced


def read_bytes(step: Step, shapes: Mapping[str, Spec]) -> int:
    """The bytes of the source that a step reads."""
    if isinstance(step, str):
        return _nbytes(shapes[step])
    if isinstance(step, Bias):
        return step.size * shapes[step.source][0].itemsize
    return sum(math.prod(part.shape) * shapes[part.source][0].itemsize for part in step)


def _nbytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def quantized_bytes(shards: Sequence[Shard], shapes: Mapping[str, Spec]) -> int:
    """The bytes of the source that are quantised."""
    steps = [step for shard in shards for step in shard.steps if isinstance(step, tuple)]
    return sum(read_bytes(step, shapes) for step in steps)
