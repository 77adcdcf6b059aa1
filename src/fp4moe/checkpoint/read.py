"""The values of a plan: packed experts and Linears, read one matrix at a time and checked.

Packed experts are copied to their place and never expanded; float ones are quantised one after the
other, so that no more than one expert, or one stack, is there as floats. Every scale is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import CheckpointError, ShapeError
from ..experts import ExpertWeights
from ..formats import NVFP4
from ..linear import FP8Linear, NVFP4Linear
from ..quantize import NVFP4Values
from .conventions import Convention, Matrix, fail
from .files import CheckpointFiles
from .plan import ExpertsPlan, LinearPlan

__all__ = ["read_experts", "read_linear", "share_global_scale"]


def share_global_scale(
    block_scale: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """Rescale block scales to a larger global scale: e4m3(block_scale x old / new).

    Exact where old equals new. Otherwise one e4m3 rounding of s = block_scale x old / new moves a
    weight by at most 6 x new x max(s / 16, 2^-10): half a unit of a 3-bit mantissa, or half the
    smallest subnormal.

    Args:
        block_scale: [L, N, K / 16] float8_e4m3fn.
        old, new: [L] float32, 0 < old <= new.

    Returns:
        [L, N, K / 16] float8_e4m3fn.
    """
    if torch.equal(old, new):
        return block_scale
    ratio = (old / new)[:, None, None]
    return (block_scale.float() * ratio).to(NVFP4.scale_dtype)


def read_experts(
    files: CheckpointFiles,
    path: str,
    plan: ExpertsPlan,
    convention: Convention,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ExpertWeights, int]:
    """Read one experts module.

    Where gate and up of an expert have different global scales, both get the larger one; see
    `share_global_scale` for the error. hidden_scale is the largest input scale of gate and up over
    the experts; intermediate_scale stays one per expert. Without input scales both are 1.

    Args:
        files: the opened checkpoint.
        path: the module, for messages.
        plan, convention: from `make_plan`.
        device: where the weights go.
        dtype: what float experts are cast to before they are quantised.

    Returns:
        The weights, and how many experts were rescaled.

    Raises:
        CheckpointError: a scale is NaN, infinite or negative, a global scale is 0, or a float
            weight is not finite.
    """
    if plan.form == "float":
        return _quantized(files, path, plan, device, dtype), 0
    facts = plan.facts
    projections = ("gate_proj", "up_proj") if facts.gated else ("up_proj",)
    parts = {name: _projection(files, plan, convention, name) for name in projections}
    scales = torch.stack([part.global_scale for part in parts.values()])
    shared = scales.amax(0)
    rescaled = int((scales != shared).any(0).sum())
    first = NVFP4Values(
        torch.cat([part.packed for part in parts.values()], 1),
        # torch 2.11 cannot concatenate e4m3 on every device; bytes it can.
        torch.cat(
            [
                share_global_scale(part.block_scale, part.global_scale, shared).view(torch.uint8)
                for part in parts.values()
            ],
            1,
        ).view(NVFP4.scale_dtype),
        shared,
    )
    down = _projection(files, plan, convention, "down_proj")
    hidden = torch.stack([_input_scales(files, plan, convention, name) for name in projections])
    weights = ExpertWeights(
        gate_up=first,
        down=down,
        activation=facts.activation,
        gated=facts.gated,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_experts=facts.num_experts,
        expert_offset=0,
        hidden_scale=_positive(hidden.amax().reshape(1), f"{path}: gate and up"),
        intermediate_scale=_input_scales(files, plan, convention, "down_proj"),
    )
    _positive(weights.intermediate_scale, f"{path}: down")
    return weights.to(device), rescaled


def read_linear(
    files: CheckpointFiles,
    plan: LinearPlan,
    convention: Convention,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> NVFP4Linear | FP8Linear:
    """Read one quantised Linear; dtype is that of its bias. Raises as `read_experts` does."""
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
        input_scale = _scalars(files, keys[part], invert).reshape(())
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


def _spread(scale: torch.Tensor, count: int, rows: slice) -> torch.Tensor:
    """One value, one an expert, or one for gate and one for up of each expert -> [E]."""
    if scale.ndim == 2 and scale.shape[1] == 2:
        return scale[:, 1 if rows.start else 0].clone()
    return scale.reshape(-1).expand(count).clone()


def _input_scales(
    files: CheckpointFiles, plan: ExpertsPlan, convention: Convention, name: str
) -> torch.Tensor:
    """[E] float32 input scales of one projection; ones where the checkpoint has none."""
    count = plan.facts.num_experts
    stack, rows = _stack(plan, name)
    if stack is not None:
        if "input_scale" not in stack.keys:
            return torch.ones(count, dtype=torch.float32, device="cpu")
        key = stack.keys["input_scale"]
        return _spread(_scalars(files, key, convention.reciprocal, zero=True), count, rows)
    each = [plan.matrices[expert, name].keys for expert in range(count)]
    if "input_scale" not in each[0]:
        return torch.ones(count, dtype=torch.float32, device="cpu")
    return torch.stack(
        [
            _scalars(files, keys["input_scale"], convention.reciprocal, zero=True).reshape(())
            for keys in each
        ]
    )


def _block_scale(files: CheckpointFiles, key: str) -> torch.Tensor:
    scale = files.tensor(key)
    # e4m3 has no infinity: 0x7F and 0xFF are NaN, and the sign bit is the highest.
    if bool(scale.view(torch.uint8).ge(0x7F).any()):
        fail("hold block scales that are numbers and not negative", f"others in {key!r}", FIX)
    return scale


def _scalars(files: CheckpointFiles, key: str, invert: bool, zero: bool = False) -> torch.Tensor:
    """Global or input scales as float32 decode multipliers; `zero` allows 0."""
    stored = files.tensor(key).to(torch.float32, copy=True)
    value = stored.reciprocal() if invert else stored
    for tensor in (stored, value):
        sound = torch.isfinite(tensor) & ((tensor >= 0) if zero else (tensor > 0))
        if not bool(sound.all()):
            bad = float(stored[~sound][0]) if stored.ndim else float(stored)
            fail("hold scales that are finite and above 0", f"{bad} in {key!r}", FIX)
    return value


def _positive(scales: torch.Tensor, where: str) -> torch.Tensor:
    if not bool((scales > 0).all()):
        fail("have seen activations where it has input scales", f"input scale 0 in {where}", FIX)
    return scales


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
    for expert in range(facts.num_experts):
        floats = {
            name: tensor[expert : expert + 1].to(device, dtype) for name, tensor in stacks.items()
        } or {
            name: files.tensor(plan.matrices[expert, name].keys["weight"]).to(device, dtype)[None]
            for name in ("gate_proj", "up_proj", "down_proj")[not facts.gated :]
        }
        one = _quantize_one(floats, facts, bool(stacks), f"{path}, expert {expert}")
        for name, tensor in one.tensors().items():
            if name == "hidden_scale":
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
    try:
        return ExpertWeights.quantize(
            **named,  # type: ignore[arg-type]
            activation=facts.activation,
            layout=facts.layout,
            transposed=facts.transposed and stacked,
        )
    except ShapeError as error:
        raise CheckpointError(
            f"from_pretrained: {where} must hold weights that can be quantised; got: {error}"
        ) from error
