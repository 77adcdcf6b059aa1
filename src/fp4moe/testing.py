"""Random layers, and how far a result is from the expected one: for tests, benchmarks and users.

Decides: the size of random values (outputs near 1 for inputs near 1, experts unlike each other).
Not handled here: inputs and routing; the self-test's layers, whose scales are calibrated.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .errors import must
from .experts import ExpertWeights
from .formats import DEFAULT_FORMAT, FORMATS, Part, StoredMatrix, WeightFormat
from .layer import Layer

__all__ = ["float_weights", "make_layer", "random_codes", "relative_error"]


def float_weights(
    experts: int,
    hidden_size: int,
    intermediate_size: int,
    gated: bool = True,
    *,
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Return normal random weights of one layer.

    Args:
        generator: the random state; default torch's own of that device.

    Returns:
        {"up": [L, I, H], "down": [L, H, I], "gate" (gated only): [L, I, H]} of that dtype, divided
        by the root of the contracted size. Each expert's matrices have a size of their own, 0.5 to
        1.5: a scale of the wrong expert shows. Biased: also "up_bias", "down_bias" and "gate_bias".
    """

    def normal(rows: int, columns: int) -> torch.Tensor:
        one, shape = (experts, 1, 1), (experts, rows, columns)
        size = 0.5 + torch.rand(one, generator=generator, dtype=torch.float32, device=device)
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        return (values * size / columns**0.5).to(dtype)

    named = {
        "up": normal(intermediate_size, hidden_size),
        "down": normal(hidden_size, intermediate_size),
    }
    if gated:
        named["gate"] = normal(intermediate_size, hidden_size)
    if biased:
        sizes = {"gate": intermediate_size, "up": intermediate_size, "down": hidden_size}
        for name in [name for name in sizes if name in named]:
            values = torch.randn(
                experts, sizes[name], generator=generator, dtype=torch.float32, device=device
            )
            named[f"{name}_bias"] = (values / 2).to(dtype)
    return named


def make_layer(
    experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: str = "silu",
    gated: bool = True,
    *,
    format: str = DEFAULT_FORMAT,
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **options: Any,
) -> ExpertWeights:
    """Return a quantised layer of random weights, see `float_weights`.

    Args:
        experts: those that are here; `num_experts` and `expert_offset` say of how many.
        format: of the weights, a name of `fp4moe.formats.FORMATS`.
        dtype: of the float weights before they are quantised.
        **options: further arguments of `ExpertWeights.quantize`.
    """
    named: dict[str, Any] = float_weights(
        experts,
        hidden_size,
        intermediate_size,
        gated,
        biased=biased,
        dtype=dtype,
        device=device,
        generator=generator,
    )
    return ExpertWeights.quantize(**named, activation=activation, format=format, **options)


def random_codes(layer: Layer, device: torch.device | str = "cpu", seed: int = 0) -> ExpertWeights:
    """Return random codes and scales of the layer's format: at once, without float weights.

    Scales make outputs near 1 for inputs near 1; those of activations are 1. Biases, if the layer
    has some, are normal with a deviation of 0.5.

    Args:
        layer: its hidden_size and intermediate_size are multiples of the format's `multiple`.

    Raises:
        ShapeError: they are not.
    """
    format = FORMATS[layer.format]
    sizes = (layer.hidden_size, layer.intermediate_size)
    if any(size % format.multiple for size in sizes):
        must(
            "random_codes: hidden_size and intermediate_size",
            f"be multiples of {format.multiple}",
            f"{sizes[0]} and {sizes[1]}",
            "Round them up, or use make_layer, which pads.",
        )
    generator = torch.Generator(device).manual_seed(seed)
    ones = torch.ones(layer.num_experts, dtype=torch.float32, device=device)
    halves = 1 + layer.gated
    rows = halves * layer.intermediate_size
    gate_up = _random_matrix(format, layer.num_experts, rows, sizes[0], halves, generator)
    down = _random_matrix(format, layer.num_experts, *sizes, 1, generator)
    biases = {}
    for name, length in (("gate_up_bias", rows), ("down_bias", sizes[0])) * layer.biased:
        shape = layer.num_experts, length
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
        biases[name] = values / 2
    return ExpertWeights(
        gate_up=gate_up,
        down=down,
        activation=layer.activation,
        gated=layer.gated,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_experts=layer.num_experts,
        expert_offset=layer.expert_offset,
        hidden_scale=ones[:1].clone(),
        intermediate_scale=ones,
        gate_up_bias=biases.get("gate_up_bias"),
        down_bias=biases.get("down_bias"),
        format=layer.format,
        quantized_activations=layer.quantized_activations,
    )


def _random_matrix(
    format: WeightFormat,
    experts: int,
    rows: int,
    columns: int,
    halves: int,
    generator: torch.Generator,
) -> StoredMatrix:
    """Return values of a root mean square near columns^-0.5, by the dtype of each part."""
    device = generator.device
    size = experts, rows, columns, halves

    def draw(low: int, high: int, part: Part) -> torch.Tensor:
        shape = part.shape(*size)
        return torch.randint(
            low, high, shape, dtype=torch.uint8, device=device, generator=generator
        )

    # What is left to the scales: e2m1's codes have a root mean square of 3, those of e4m3 of 1.
    factor = columns**-0.5 / (3 if format.codes.dtype == torch.uint8 else 1)
    block_scale = torch.empty(0, dtype=torch.float32, device=device)
    global_scale = block_scale
    if format.globally_scaled:
        global_scale = torch.full((experts,), factor, dtype=torch.float32, device=device)
        factor = 1.0
    if format.scales is not None:
        # 0.5 to 2 times the factor, in steps of E4M3 or of powers of two.
        if format.scales.dtype == torch.uint8:
            exponent = 127 + round(math.log2(factor))
            block_scale = draw(exponent - 1, exponent + 2, format.scales)
        else:
            steps = draw(0x30, 0x41, format.scales).view(torch.float8_e4m3fn)
            own = format.scales.dtype != torch.float32
            block_scale = steps if own else steps.float() * factor
    if format.codes.dtype == torch.uint8:
        return format.container(draw(0, 256, format.codes), block_scale, global_scale)
    # No NaN: magnitudes of 0.5 to 2, and a sign.
    codes = draw(0x30, 0x41, format.codes) | draw(0, 2, format.codes) << 7
    return format.container(codes.view(format.codes.dtype), block_scale, global_scale)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|, the root of the sums of squares of all elements.

    NaN where a value is NaN; where all that is expected is 0, 0 if actual is, else infinity.

    Raises:
        ShapeError: the shapes differ, or there is no element.
    """
    if actual.shape != expected.shape or not expected.numel():
        got = f"{list(actual.shape)} and {list(expected.shape)}"
        advice = "Compare a result with another of its shape."
        must("relative_error: actual and expected", "have one shape with elements", got, advice)
    wanted = expected.detach().double()
    difference, size = (float(x.norm()) for x in (actual.detach().double() - wanted, wanted))
    if size == 0:
        return float("inf") if difference > 0 else difference
    return difference / size
