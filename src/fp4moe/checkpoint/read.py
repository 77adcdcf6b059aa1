"""The values of a plan: packed experts and Linears, read one matrix at a time and checked.

Packed experts are copied to their place and never expanded; float ones are in read_floats.py. Of a
module that is shared by processes one part is read. Every scale of it is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch

from ..activations import get_activation
from ..experts import ExpertWeights
from ..formats import FORMATS, StoredMatrix
from ..formats.base import Part as Grid
from ..linear import PackedLinear, packed_linear
from ..pack import split_gate_up
from ..padding import round_up
from ..part import EXPERTS, INTERMEDIATE, ROWS, Part
from .files import CheckpointFiles
from .naming import Convention, Matrix, fail
from .plan import ExpertsPlan, LinearPlan
from .read_floats import experts_here, quantize_experts, read_biases
from .values import (
    CPU,
    FIX,
    Cut,
    fill_unseen,
    is_normal,
    read_block_scales,
    read_codes,
    read_input_scales,
    read_numbers,
    spread,
)

__all__ = ["ReadExperts", "read_experts", "read_linear"]


@dataclasses.dataclass
class ReadExperts:
    """One experts module as read.

    Attributes:
        weights: on their device.
        folded: how many experts have gate and up with global scales of their own.
        unseen: the experts that have no input scale where others of the module have one.
    """

    weights: ExpertWeights
    folded: int = 0
    unseen: tuple[int, ...] = ()


def read_experts(
    files: CheckpointFiles,
    path: str,
    plan: ExpertsPlan,
    convention: Convention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    part: Part | None = None,
) -> ReadExperts:
    """Read one experts module, or one part of it.

    A format with global scales has one for gate and up. Where the file's differ, gate's is kept
    and s = up's / gate's moves into down, which is exact since up enters linearly: what is up / s
    here meets down x s. The range of down's input and up's bias are divided by s as well. An
    activation that clamps or shifts up forbids it.

    hidden_scale is the largest input scale of gate and up over the experts; intermediate_scale
    stays one per expert. An expert that saw no token while calibrating (a scale that is missing, 0
    or infinite) gets the largest of the others; without any scale both are 1.

    Args:
        files: the opened checkpoint.
        path: the module, for messages.
        plan, convention: from `make_plan`.
        device: where the weights go.
        dtype: what float experts are cast to before they are quantised, and biases.
        part: what is read and held; None for all. Ids stay global. Float experts are quantised
            whole and then cut, so that each number is that of the whole layer.

    Raises:
        CheckpointError: a scale is NaN or negative, a global scale is 0 or infinite, a float weight
            or a bias is not finite, or gate and up have global scales that cannot be made one.
    """
    if plan.form == "float":
        return ReadExperts(quantize_experts(files, path, plan, device, dtype, part))
    facts, format = plan.facts, FORMATS[plan.form]
    projections = ("gate_proj", "up_proj") if facts.gated else ("up_proj",)
    by_columns = part is not None and part.kind == INTERMEDIATE
    size = part.size if part is not None and by_columns else facts.intermediate_size
    inner, outer = (round_up(n, format.multiple) for n in (size, facts.hidden_size))
    here = experts_here(plan, part)
    halves, local = len(projections), len(here)
    first = format.zeros(local, halves * inner, outer, halves, CPU)
    second = format.zeros(local, outer, inner, device=CPU)
    reader = _Reader(files, plan, convention, part)
    scales = [
        reader.fill(name, _half(first, half, halves)) for half, name in enumerate(projections)
    ]
    down_scale = reader.fill("down_proj", second)
    inputs = [reader.input_scales(name) for name in (*projections, "down_proj")]
    # fmax prefers a number to NaN: one of the two scales of an input is enough.
    hidden_inputs = functools.reduce(torch.fmax, inputs[:-1])
    hidden, unseen = fill_unseen(hidden_inputs)
    intermediate, unseen_by_down = fill_unseen(inputs[-1])
    # The largest scales are those of the whole layer.
    intermediate = intermediate[here.start : here.stop]
    biases = read_biases(files, plan, dtype, here)
    if part is not None and by_columns:
        biases = _of_columns(biases, part)
    ratio = torch.ones_like(intermediate)
    if format.globally_scaled:
        ratio = scales[-1] / scales[0]
        moved = down_scale * ratio, intermediate / ratio
        activation = get_activation(facts.activation)
        linear = not activation.needs_gate or bool((ratio == 1).all())
        if not linear or not all(is_normal(scale) for scale in moved):
            got = f"gate {scales[0].tolist()} and up {scales[-1].tolist()}"
            fail(f"have global scales of gate and up that are alike in {path}", got[:200], FIX)
        first = dataclasses.replace(first, global_scale=scales[0])
        second = dataclasses.replace(second, global_scale=moved[0])
        intermediate = moved[1]
    if "up_bias" in biases:
        biases["up_bias"] = biases["up_bias"] / ratio[:, None]
    both = _both(biases, local, facts.gated, inner, outer)
    stored_range = format.activation_range is not None
    ranges = not any(bool(s.isnan().all()) for s in (hidden_inputs, inputs[-1]))
    weights = ExpertWeights(
        gate_up=first,
        down=second,
        activation=facts.activation,
        gated=facts.gated,
        hidden_size=facts.hidden_size,
        intermediate_size=size,
        num_experts=facts.num_experts,
        expert_offset=here.start,
        hidden_scale=hidden.amax().reshape(1),
        intermediate_scale=intermediate,
        gate_up_bias=both.get("gate_up_bias"),
        down_bias=both.get("down_bias"),
        format=plan.form,
        quantized_activations=convention.rounds(plan.form) and (ranges or not stored_range),
    )
    return ReadExperts(
        weights.to(device), int((ratio != 1).sum()), tuple(sorted(unseen | unseen_by_down))
    )


def read_linear(
    files: CheckpointFiles,
    plan: LinearPlan,
    convention: Convention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    part: Part | None = None,
) -> PackedLinear:
    """Read one quantised Linear; dtype is that of its bias. Raises as `read_experts` does.

    part: the rows, or the columns, that are read and held; None for all. The bias of columns is
    that of the first part alone, since the outputs are added up. An input scale of 0 or infinity,
    of a Linear that saw no token, is left out: none is used here.
    """
    keys, facts, format = plan.matrix.keys, plan.facts, FORMATS[plan.form]
    names = convention.names[plan.form]
    bias = files.tensor(keys["bias"]).to(dtype, copy=True) if "bias" in keys else None
    if bias is not None and not bool(torch.isfinite(bias).all()):
        fail("hold finite numbers", f"inf or NaN in {keys['bias']!r}", FIX)
    if bias is not None and part is not None:
        bias = bias[part.start : part.stop] if part.kind == ROWS else None if part.index else bias
    input_scale = None
    if "input_scale" in keys:
        stored = read_input_scales(
            files, keys["input_scale"], names["input_scale"] in convention.reciprocal
        )
        input_scale = stored.reshape(()) if float(stored) else None
    shapes = format.shapes(1, facts.out_features, facts.in_features)

    def cut(grid: Grid | None) -> Cut:
        if part is None or grid is None:
            return lambda tensor: tensor
        return functools.partial(part.cut_stored, grid=grid)

    weight = read_codes(files, keys["packed"], shapes["packed"][1], cut(format.codes))
    scale = read_block_scales(
        files, keys["block_scale"], *shapes["block_scale"], cut(format.scales)
    )
    weight, scale = weight.clone()[0], scale.clone()[0]
    global_scale = None
    if format.globally_scaled:
        invert = names["global_scale"] in convention.reciprocal
        global_scale = read_numbers(files, keys["global_scale"], invert).reshape(())
    linear = packed_linear(plan.form, weight, scale, global_scale, bias, input_scale)
    return linear.to(device)


def _half(stored: StoredMatrix, half: int, halves: int) -> StoredMatrix:
    """The rows of gate or of up, as views."""
    parts = {
        name: part.chunk(halves, 1)[half] if part.ndim == 3 else part
        for name, part in stored.parts().items()
    }
    return dataclasses.replace(stored, **parts)


@dataclasses.dataclass
class _Reader:
    """Reads the projections of one experts module, one key after the other."""

    files: CheckpointFiles
    plan: ExpertsPlan
    convention: Convention
    part: Part | None

    def fill(self, name: str, out: StoredMatrix) -> torch.Tensor:
        """Copy one projection, [L, N, K], into `out`; returns global scales [L]."""
        facts, format = self.plan.facts, FORMATS[self.plan.form]
        rows, columns = facts.intermediate_size, facts.hidden_size
        if name == "down_proj":
            rows, columns = columns, rows
        here = experts_here(self.plan, self.part)
        stack, which = self._stack(name)
        global_scale = torch.ones(len(here), dtype=torch.float32, device=CPU)
        if stack is not None:
            self._copy(name, stack.keys, (facts.num_experts, rows, columns), which, out)
            if format.globally_scaled:
                scale = self._numbers(stack.keys["global_scale"], "global_scale")
                global_scale = spread(scale, facts.num_experts, which)[here.start : here.stop]
            return global_scale
        for index, expert in enumerate(here):
            keys = self.plan.matrices[expert, name].keys
            one = {part: t[index : index + 1] for part, t in out.parts().items()}
            self._copy(name, keys, (1, rows, columns), None, dataclasses.replace(out, **one))
            if format.globally_scaled:
                value = self._numbers(keys["global_scale"], "global_scale")
                global_scale[index] = value.reshape(())
        return global_scale

    def input_scales(self, name: str) -> torch.Tensor:
        """[E] float32 input scales of one projection; NaN where there is none, 0 without tokens."""
        count = self.plan.facts.num_experts
        leaf = self.convention.names[self.plan.form].get("input_scale")
        invert = leaf in self.convention.reciprocal
        scales = torch.full((count,), torch.nan, dtype=torch.float32, device=CPU)
        stack, which = self._stack(name)
        if stack is not None:
            if "input_scale" in stack.keys:
                stored = read_input_scales(self.files, stack.keys["input_scale"], invert)
                scales = spread(stored, count, which)
            return scales
        for expert in range(count):
            keys = self.plan.matrices[expert, name].keys
            if "input_scale" in keys:
                stored = read_input_scales(self.files, keys["input_scale"], invert)
                scales[expert] = stored.reshape(())
        return scales

    def _stack(self, name: str) -> tuple[Matrix | None, int | None]:
        """The stack that holds a projection, and as which half; no stack: experts are separate."""
        if (None, name) in self.plan.matrices:
            return self.plan.matrices[None, name], None
        return self.plan.matrices.get((None, "gate_up_proj")), int(name != "gate_proj")

    def _numbers(self, key: str, part: str) -> torch.Tensor:
        names = self.convention.names[self.plan.form]
        return read_numbers(self.files, key, names[part] in self.convention.reciprocal)

    def _copy(
        self,
        name: str,
        keys: Mapping[str, str],
        size: tuple[int, int, int],
        half: int | None,
        out: StoredMatrix,
    ) -> None:
        """Copy codes and block scales of the file, or one half of their rows, into `out`.

        size: experts, rows and columns of the half.
        """
        format = FORMATS[self.plan.form]
        layout = self.plan.facts.layout if self.convention.interleaved else "gate_up"
        for slot, grid in (("packed", format.codes), ("block_scale", format.scales)):
            dtype, (count, rows, columns) = format.shapes(*size)[slot]
            whole = (count, rows if half is None else 2 * rows, columns)

            def cut(tensor: torch.Tensor, grid=grid, count=count) -> torch.Tensor:
                if half is not None:
                    tensor = split_gate_up(tensor, layout)[half]
                if self.part is None or (self.part.kind == EXPERTS and count == 1):
                    return tensor
                return self.part.cut_stored(tensor, grid, down=name == "down_proj")

            if slot == "packed":
                tensor = read_codes(self.files, keys[slot], whole, cut)
            else:
                tensor = read_block_scales(self.files, keys[slot], dtype, whole, cut)
            # Bytes: not every device copies e4m3.
            to = getattr(out, slot)[:, : tensor.shape[1], : tensor.shape[2]]
            if dtype.itemsize == 1:
                to, tensor = to.view(torch.uint8), tensor.view(torch.uint8)
            to.copy_(tensor)


def _of_columns(biases: Mapping[str, torch.Tensor], part: Part) -> dict[str, torch.Tensor]:
    """Those of some intermediate columns; the bias of down is in the first part alone."""
    return {
        name: bias * (part.start == 0) if name == "down_bias" else bias[:, part.start : part.stop]
        for name, bias in biases.items()
    }


def _both(
    biases: Mapping[str, torch.Tensor], local: int, gated: bool, inner: int, outer: int
) -> dict[str, torch.Tensor]:
    """Float32 biases of both GEMMs, zero-padded as ExpertWeights takes them; {} without any."""
    if not biases:
        return {}

    def one(name: str, size: int) -> torch.Tensor:
        padded = torch.zeros(local, size, dtype=torch.float32, device=CPU)
        if (bias := biases.get(f"{name}_bias")) is not None:
            padded[:, : bias.shape[1]] = bias
        return padded

    first = [one(name, inner) for name in ("gate", "up")[not gated :]]
    return {"gate_up_bias": torch.cat(first, 1), "down_bias": one("down", outer)}
