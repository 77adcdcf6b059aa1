"""The values of a plan: packed experts and Linears, read one matrix at a time and checked.

Packed experts are copied to their place and never expanded; float ones are quantised one after the
other, so that no more than one expert, or one stack, is there as floats. Every scale is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch

from ..activations import get_activation
from ..errors import CheckpointError, ShapeError
from ..experts import ExpertWeights
from ..formats import NVFP4
from ..formats.nvfp4 import NVFP4Values
from ..linear import FP8Linear, NVFP4Linear
from ..pack import split_gate_up
from .files import CheckpointFiles
from .naming import Convention, Matrix, fail
from .plan import ExpertsFacts, ExpertsPlan, LinearPlan

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
) -> ReadExperts:
    """Read one experts module.

    An expert has one global scale for gate and up. Where those of the file differ, gate's is kept
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

    Raises:
        CheckpointError: a scale is NaN or negative, a global scale is 0 or infinite, a float weight
            or a bias is not finite, or gate and up have global scales that cannot be made one.
    """
    if plan.form == "float":
        return ReadExperts(_quantized(files, path, plan, device, dtype))
    facts = plan.facts
    projections = ("gate_proj", "up_proj") if facts.gated else ("up_proj",)
    parts = [_projection(files, plan, convention, name) for name in projections]
    down = _projection(files, plan, convention, "down_proj")
    inputs = [_input_scales(files, plan, convention, name) for name in (*projections, "down_proj")]
    # fmax prefers a number to NaN: one of the two scales of an input is enough.
    hidden, unseen = _fill(functools.reduce(torch.fmax, inputs[:-1]))
    inner, unseen_by_down = _fill(inputs[-1])
    ratio = parts[-1].global_scale / parts[0].global_scale
    moved = down.global_scale * ratio, inner / ratio
    activation = get_activation(facts.activation)
    linear = not activation.needs_gate or bool((ratio == 1).all())
    if not linear or not all(_normal(scale) for scale in moved):
        got = f"gate {parts[0].global_scale.tolist()} and up {parts[-1].global_scale.tolist()}"
        fail(f"have global scales of gate and up that are alike in {path}", got[:200], FIX)
    biases = _biases(files, plan, dtype)
    if "up_bias" in biases:
        biases["up_bias"] = biases["up_bias"] / ratio[:, None]
    both = _both(biases, facts)
    weights = ExpertWeights(
        gate_up=NVFP4Values(
            torch.cat([part.packed for part in parts], 1),
            # torch 2.11 cannot concatenate e4m3 on every device; bytes it can.
            torch.cat([part.block_scale.view(torch.uint8) for part in parts], 1).view(
                NVFP4.scale_dtype
            ),
            parts[0].global_scale,
        ),
        down=dataclasses.replace(down, global_scale=moved[0]),
        activation=facts.activation,
        gated=facts.gated,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_experts=facts.num_experts,
        expert_offset=0,
        hidden_scale=hidden.amax().reshape(1),
        intermediate_scale=moved[1],
        gate_up_bias=both.get("gate_up_bias"),
        down_bias=both.get("down_bias"),
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
) -> NVFP4Linear | FP8Linear:
    """Read one quantised Linear; dtype is that of its bias. Raises as `read_experts` does.

    An input scale of 0 or infinity, of a Linear that saw no token, is left out: none is used here.
    """
    keys = plan.matrix.keys
    weight = files.tensor(keys["weight"]).clone()
    bias = files.tensor(keys["bias"]).to(dtype, copy=True) if "bias" in keys else None
    if bias is not None and not bool(torch.isfinite(bias).all()):
        fail("hold finite numbers", f"inf or NaN in {keys['bias']!r}", FIX)
    part = "input_scale" if "input_scale" in keys else "fp8_input_scale"
    input_scale = None
    if part in keys:
        # ModelOpt's FP8 layers and compressed-tensors' have it as a decode multiplier.
        invert = convention.reciprocal and part == "input_scale"
        stored = _seen(files, keys[part], invert).reshape(())
        input_scale = stored if float(stored) else None
    linear: NVFP4Linear | FP8Linear
    if plan.form == "nvfp4":
        scale = _block_scale(files, keys["scale"]).clone()
        global_scale = _scalars(files, keys["global_scale"], convention.reciprocal).reshape(())
        linear = NVFP4Linear(weight, scale, global_scale, bias, input_scale)
    else:
        if bool(weight.view(torch.uint8).bitwise_and(127).eq(127).any()):
            fail("hold no NaN", f"NaN in {keys['weight']!r}", FIX)
        rows = _scalars(files, keys["scale"], False)
        rows = rows.reshape(()) if rows.numel() == 1 else rows.reshape(-1, 1)
        linear = FP8Linear(weight, rows, bias, input_scale)
    return linear.to(device)


FIX = "Download it again, or quantise the model again"


def _projection(
    files: CheckpointFiles, plan: ExpertsPlan, convention: Convention, name: str
) -> NVFP4Values:
    """One projection of all experts: packed [E, N, K / 2] and its scales, global_scale [E]."""
    count = plan.facts.num_experts
    stack, rows = _stack(plan, name)
    if stack is not None:
        keys = stack.keys
        scale = _scalars(files, keys["global_scale"], convention.reciprocal)
        packed, scales = files.tensor(keys["weight"]), _block_scale(files, keys["scale"])
        if rows == slice(None):
            # The model must not keep the file mapped; the halves of a stack are copied later.
            packed, scales = packed.clone(), scales.clone()
        return NVFP4Values(packed[:, rows], scales[:, rows], _spread(scale, count, rows))
    each = [plan.matrices[expert, name].keys for expert in range(count)]
    rows_columns, blocks = (files.shapes[each[0][part]][1] for part in ("weight", "scale"))
    packed = torch.empty((count, *rows_columns), dtype=torch.uint8, device="cpu")
    scales = torch.empty((count, *blocks), dtype=NVFP4.scale_dtype, device="cpu")
    global_scale = torch.empty(count, dtype=torch.float32, device="cpu")
    for expert, keys in enumerate(each):
        packed[expert] = files.tensor(keys["weight"])
        block = _block_scale(files, keys["scale"])
        scales.view(torch.uint8)[expert] = block.view(torch.uint8)
        value = _scalars(files, keys["global_scale"], convention.reciprocal)
        global_scale[expert] = value.reshape(())
    return NVFP4Values(packed, scales, global_scale)


def _stack(plan: ExpertsPlan, name: str) -> tuple[Matrix | None, slice]:
    """The stack that holds a projection, and its rows there; None where experts are separate."""
    if (None, name) in plan.matrices:
        return plan.matrices[None, name], slice(None)
    stack = plan.matrices.get((None, "gate_up_proj"))
    size = plan.facts.intermediate_size
    return stack, slice(0, size) if name == "gate_proj" else slice(size, 2 * size)


def _biases(
    files: CheckpointFiles, plan: ExpertsPlan, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Those that there are of gate_bias, up_bias [E, I] and down_bias [E, H], cast to dtype."""
    found: dict[str, torch.Tensor] = {}
    for (expert, name), key in plan.biases.items():
        bias = files.tensor(key).to(dtype, copy=True)
        if not bool(torch.isfinite(bias).all()):
            fail("hold finite numbers", f"inf or NaN in {key!r}", FIX)
        stem = name.removesuffix("_proj")
        if expert is not None:
            size = (plan.facts.num_experts, *bias.shape)
            whole = found.setdefault(f"{stem}_bias", bias.new_zeros(size))
            whole[expert] = bias
        elif stem == "gate_up":
            pair = split_gate_up(bias[..., None], plan.facts.layout)
            found |= {"gate_bias": pair[0][..., 0], "up_bias": pair[1][..., 0]}
        else:
            found[f"{stem}_bias"] = bias
    return found


def _both(biases: Mapping[str, torch.Tensor], facts: ExpertsFacts) -> dict[str, torch.Tensor]:
    """Float32 biases of both GEMMs, as ExpertWeights takes them; {} without any."""
    if not biases:
        return {}
    sizes = {"gate": facts.intermediate_size, "up": facts.intermediate_size}
    sizes["down"] = facts.hidden_size

    def one(name: str) -> torch.Tensor:
        zeros = torch.zeros(facts.num_experts, sizes[name], dtype=torch.float32, device="cpu")
        return biases.get(f"{name}_bias", zeros).float()

    first = [one(name) for name in ("gate", "up")[not facts.gated :]]
    return {"gate_up_bias": torch.cat(first, 1), "down_bias": one("down")}


def _spread(scale: torch.Tensor, count: int, rows: slice) -> torch.Tensor:
    """One value, one an expert, or one for gate and one for up of each expert -> [E]."""
    if scale.ndim == 2 and scale.shape[1] == 2:
        return scale[:, 1 if rows.start else 0].clone()
    return scale.reshape(-1).expand(count).clone()


def _input_scales(
    files: CheckpointFiles, plan: ExpertsPlan, convention: Convention, name: str
) -> torch.Tensor:
    """[E] float32 input scales of one projection; NaN where there is none, 0 without tokens."""
    count = plan.facts.num_experts
    scales = torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
    stack, rows = _stack(plan, name)
    if stack is not None:
        if "input_scale" in stack.keys:
            stored = _seen(files, stack.keys["input_scale"], convention.reciprocal)
            scales = _spread(stored, count, rows)
        return scales
    for expert in range(count):
        keys = plan.matrices[expert, name].keys
        if "input_scale" in keys:
            stored = _seen(files, keys["input_scale"], convention.reciprocal)
            scales[expert] = stored.reshape(())
    return scales


def _seen(files: CheckpointFiles, key: str, invert: bool) -> torch.Tensor:
    """Input scales as float32 decode multipliers; 0 where calibration saw no token."""
    stored = files.tensor(key).to(torch.float32, copy=True)
    if bad := stored[~(stored >= 0)].tolist():
        fail("hold input scales that are numbers and not negative", f"{bad[0]} in {key!r}", FIX)
    value = stored.reciprocal() if invert else stored
    return torch.where(torch.isfinite(value), value, 0)


def _block_scale(files: CheckpointFiles, key: str) -> torch.Tensor:
    scale = files.tensor(key)
    # e4m3 has no infinity: 0x7F and 0xFF are NaN, and the sign bit is the highest.
    if bool(scale.view(torch.uint8).ge(0x7F).any()):
        fail("hold block scales that are numbers and not negative", f"others in {key!r}", FIX)
    return scale


def _scalars(files: CheckpointFiles, key: str, invert: bool) -> torch.Tensor:
    """Global scales, or those of FP8 weights, as float32 decode multipliers."""
    stored = files.tensor(key).to(torch.float32, copy=True)
    value = stored.reciprocal() if invert else stored
    for tensor in (stored, value):
        sound = torch.isfinite(tensor) & (tensor > 0)
        if not bool(sound.all()):
            bad = float(stored[~sound][0]) if stored.ndim else float(stored)
            fail("hold scales that are finite and above 0", f"{bad} in {key!r}", FIX)
    return value


def _fill(scales: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
    """[E] input scales with the largest for whom none is known, and who these are."""
    if bool(scales.isnan().all()):
        return torch.ones_like(scales), set()
    known = scales > 0
    largest = float(scales[known].amax()) if bool(known.any()) else 1.0
    return torch.where(known, scales, largest), set((~known).nonzero().flatten().tolist())


def _normal(scales: torch.Tensor) -> bool:
    """Whether all are finite and so large that float32 keeps all bits."""
    return bool((torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny)).all())


def _quantized(
    files: CheckpointFiles, path: str, plan: ExpertsPlan, device: torch.device, dtype: torch.dtype
) -> ExpertWeights:
    facts = plan.facts
    whole: dict[str, torch.Tensor] = {}
    metadata: dict = {}
    stacks = {
        name: files.tensor(matrix.keys["weight"])
        for (expert, name), matrix in plan.matrices.items()
        if expert is None
    }
    biases = _biases(files, plan, dtype)
    for expert in range(facts.num_experts):
        floats = {
            name: tensor[expert : expert + 1].to(device, dtype) for name, tensor in stacks.items()
        } or {
            name: files.tensor(plan.matrices[expert, name].keys["weight"]).to(device, dtype)[None]
            for name in ("gate_proj", "up_proj", "down_proj")[not facts.gated :]
        }
        floats |= {name: b[expert : expert + 1].to(device) for name, b in biases.items()}
        one = _quantize_one(floats, facts, bool(stacks), f"{path}, expert {expert}")
        for name, tensor in one.tensors().items():
            if name == "hidden_scale" or not tensor.numel():
                whole[name] = tensor
                continue
            if expert == 0:
                size = (facts.num_experts, *tensor.shape[1:])
                whole[name] = torch.empty(size, dtype=tensor.dtype, device=device)
            # Bytes: not every device copies e4m3.
            to, source = whole[name][expert], tensor[0]
            if tensor.dtype == NVFP4.scale_dtype:
                to, source = to.view(torch.uint8), source.view(torch.uint8)
            to.copy_(source)
        metadata = one.metadata()
    return ExpertWeights.from_tensors(whole, metadata | {"num_experts": facts.num_experts})


def _quantize_one(
    floats: Mapping[str, torch.Tensor], facts, stacked: bool, where: str
) -> ExpertWeights:
    named = {name.removesuffix("_proj"): tensor for name, tensor in floats.items()}
    layout = facts.layout
    if "w13" in named:
        # Inkling's own name for gate and up, row by row.
        named["gate_up"], layout = named.pop("w13"), "gate_up_interleaved"
    try:
        return ExpertWeights.quantize(
            **named,  # type: ignore[arg-type]
            activation=facts.activation,
            layout=layout,
            transposed=facts.transposed and stacked,
            format=facts.format,
        )
    except ShapeError as error:
        raise CheckpointError(
            f"from_pretrained: {where} must hold weights that can be quantised; got: {error}"
        ) from error
