"""Float expert weights to quantised tensors, one expert at a time, for ExpertWeights.quantize."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F

from .errors import must, refuse
from .formats import FORMATS, StoredMatrix, WeightFormat
from .formats.base import as_bytes
from .padding import round_up

__all__ = [
    "GATE_UP_LAYOUTS",
    "activation_scale",
    "gate_and_up",
    "oriented",
    "quantize_experts",
    "split_gate_up",
    "stack_biases",
]

# How a stacked gate/up weight may order its 2 * intermediate_size output rows.
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved")


def _must(argument: str, rule: str, got: object, advice: str) -> NoReturn:
    must(f"ExpertWeights.quantize: {argument}", rule, got, advice)


def split_gate_up(gate_up: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gate, up) as views of gate_up [..., 2 * intermediate_size, hidden_size]."""
    if layout not in GATE_UP_LAYOUTS:
        rule = f"be one of {', '.join(GATE_UP_LAYOUTS)}"
        _must("layout", rule, repr(layout), "Pass the order in which the rows are stored.")
    if layout.endswith("interleaved"):
        first, second = gate_up[..., 0::2, :], gate_up[..., 1::2, :]
    else:
        first, second = gate_up.chunk(2, dim=-2)
    return (first, second) if layout.startswith("gate") else (second, first)


def quantize_experts(
    format: WeightFormat, parts: dict[str, torch.Tensor], down: torch.Tensor, method: str
) -> tuple[StoredMatrix, StoredMatrix]:
    """Return the quantised tensors of both GEMMs; H and I zero-padded to the format's multiple.

    Args:
        parts: {"gate" (gated only), "up"}, each [L, I, H]. down: [L, H, I].
        method: "max" or "mse".
    """
    format.check_method(method, caller="ExpertWeights.quantize")
    _check_float_weights(parts, down)
    experts, intermediate, hidden = parts["up"].shape
    i_padded, h_padded = (round_up(size, format.multiple) for size in (intermediate, hidden))
    halves = len(parts)
    first = format.zeros(experts, halves * i_padded, h_padded, halves, down.device)
    second = format.zeros(experts, h_padded, i_padded, device=down.device)
    for expert in range(experts):
        shared_scale = _shared_scale(format, parts, expert)
        for index, weight in enumerate(parts.values()):
            half = index, halves
            _quantize_into(format, first, expert, half, weight[expert], shared_scale, method)
        scale = _shared_scale(format, {"down": down}, expert)
        _quantize_into(format, second, expert, (0, 1), down[expert], scale, method)
    return first, second


def gate_and_up(
    up: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_up: torch.Tensor | None,
    layout: str,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    """Return the output rows by name, [L, I, H] each, from either of the two ways to pass them."""
    if (gate_up is None) == (up is None) or (gate is not None and up is None):
        given = [n for n, t in (("up", up), ("gate", gate), ("gate_up", gate_up)) if t is not None]
        rule = "be either gate_up, or up with an optional gate"
        _must("arguments", rule, given, "Pass one of the two forms.")
    if gate_up is not None:
        if gate_up.ndim != 3 or gate_up.shape[-1 if transposed else -2] % 2:
            rule = "have shape [L, 2 * I, H] ([L, H, 2 * I] when transposed)"
            _must("gate_up", rule, list(gate_up.shape), "Stack gate and up on the output axis.")
        gate, up = split_gate_up(gate_up.transpose(-1, -2) if transposed else gate_up, layout)
    else:
        gate, up = (None if w is None else oriented(w, transposed) for w in (gate, up))
    assert up is not None
    return {"up": up} if gate is None else {"gate": gate, "up": up}


def oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return the weight as [..., out, in]."""
    # Below 2 axes there is nothing to transpose; the shape check names it.
    return weight.transpose(-1, -2) if transposed and weight.ndim > 1 else weight


def _check_float_weights(parts: dict[str, torch.Tensor], down: torch.Tensor) -> None:
    up = parts["up"]
    if up.ndim != 3:
        _must("up", "have shape [L, I, H]", list(up.shape), "Stack the experts on axis 0.")
    experts, intermediate, hidden = up.shape
    if not experts * intermediate * hidden:
        _must("up", "not be empty", list(up.shape), "Pass at least one expert with weights.")
    expected = {name: (experts, intermediate, hidden) for name in parts} | {
        "down": (experts, hidden, intermediate)
    }
    for name, tensor in {**parts, "down": down}.items():
        if tuple(tensor.shape) != expected[name]:
            rule = f"have shape {list(expected[name])} to match up [L, I, H] = {list(up.shape)}"
            _must(name, rule, list(tensor.shape), "Check the order of the axes (transposed=).")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            rule = "be bfloat16, float16, float32 or float64"
            _must(name, rule, tensor.dtype, "Dequantise it first.")
        if tensor.is_meta and up.is_meta:
            _must(name, "hold values", "a meta tensor", "Load the checkpoint first.")
        if tensor.device != up.device:
            _must(name, f"be on the device of up, {up.device}", tensor.device, "Move it there.")


def stack_biases(
    format: WeightFormat,
    parts: dict[str, torch.Tensor],
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return the float32 biases of both GEMMs, zero-padded as the weights; None without any.

    Args:
        format, parts, down: as for `quantize_experts`. gate_bias, up_bias: [L, I].
        gate_up_bias: [L, 2 * I] instead, in the order of layout. down_bias: [L, H].
    """
    experts, intermediate, hidden = parts["up"].shape
    given: dict[str, torch.Tensor | None] = {
        "gate_bias": gate_bias,
        "up_bias": up_bias,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    shapes = {
        "gate_bias": (experts, intermediate) if "gate" in parts else None,
        "up_bias": (experts, intermediate),
        "gate_up_bias": (experts, 2 * intermediate) if "gate" in parts else None,
        "down_bias": (experts, hidden),
    }
    found = {name: tensor for name, tensor in given.items() if tensor is not None}
    if not found:
        return None, None
    if gate_up_bias is not None and (gate_bias is not None or up_bias is not None):
        names = list(found)
        rule = "be either gate_up_bias, or gate_bias and up_bias"
        _must("biases", rule, names, "Pass one of the two forms.")
    for name, tensor in found.items():
        shape = shapes[name]
        if shape is None or tensor.shape != shape or not tensor.is_floating_point():
            rule = f"be float {list(shape)}" if shape else "not be given without a gate"
            got = f"{tensor.dtype} {list(tensor.shape)}"
            _must(name, rule, got, "Pass one value an output.")
        if tensor.device != down.device:
            rule = f"be on the device of down, {down.device}"
            _must(name, rule, tensor.device, "Move it there.")
        if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
            rule, advice = "be finite in float32", "Find the layer that made it."
            _must(name, rule, "inf or NaN", advice)
    if gate_up_bias is not None:
        pair = split_gate_up(gate_up_bias[..., None], layout)
        gate_bias, up_bias = (half[..., 0] for half in pair)
    i_padded, h_padded = (round_up(size, format.multiple) for size in (intermediate, hidden))
    halves = [gate_bias, up_bias] if "gate" in parts else [up_bias]
    first = torch.cat([_padded_bias(half, experts, i_padded, down.device) for half in halves], 1)
    return first, _padded_bias(down_bias, experts, h_padded, down.device)


def _padded_bias(
    bias: torch.Tensor | None, experts: int, size: int, device: torch.device
) -> torch.Tensor:
    out = torch.zeros(experts, size, dtype=torch.float32, device=device)
    if bias is not None:
        out[:, : bias.shape[1]] = bias
    return out


def _shared_scale(
    format: WeightFormat, weights: dict[str, torch.Tensor], expert: int
) -> torch.Tensor:
    # From the largest magnitude of all of them: an all-zero gate must not bring its scale of 1.
    ends = {name: torch.stack(torch.aminmax(w[expert])).float() for name, w in weights.items()}
    for name, pair in ends.items():
        if not bool(torch.isfinite(pair).all()):
            got = f"values from {float(pair[0])} to {float(pair[1])}"
            advice = "Find the layer that made them."
            _must(f"{name} of expert {expert}", "be finite in float32", got, advice)
    return format.shared_scale(torch.stack(list(ends.values())))


def _quantize_into(
    format: WeightFormat,
    out: StoredMatrix,
    expert: int,
    half: tuple[int, int],
    weight: torch.Tensor,
    shared_scale: torch.Tensor,
    method: str,
) -> None:
    columns = round_up(weight.shape[1], format.multiple)
    if columns != weight.shape[1]:
        weight = F.pad(weight, (0, columns - weight.shape[1]))
    index, halves = half
    for name, part in format.quantize(weight, shared_scale, method).parts().items():
        whole = getattr(out, name)
        if whole.ndim == 3:
            start = index * (whole.shape[1] // halves)
            as_bytes(whole)[expert, start : start + part.shape[0]] = as_bytes(part)
        elif whole.numel():
            whole[expert] = part


def activation_scale(
    format: str,
    name: str,
    value: float | torch.Tensor,
    count: int,
    device: torch.device,
    caller: str = "ExpertWeights.quantize",
) -> torch.Tensor:
    """Return the decode multipliers of activations as float32 [count], checked."""
    scale = torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(-1)
    range = FORMATS[format].activation_range
    if scale.numel() not in (1, count) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        must(
            f"{caller}: {name}",
            f"be positive and finite, one value or {count}",
            value,
            f"Pass amax / {range:g}, or 1.0 where it is unknown." if range else "Leave it out.",
        )
    if range is None and not bool((scale == 1).all()):
        reason = f"kernels of {format} compute the scales of activations from each input"
        refuse(caller, f"{name} = {value} has no use", reason, "Leave it out.")
    return scale.expand(count).clone()
