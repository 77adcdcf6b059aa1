"""Random layers, and how far a result is from the expected one: for tests, benchmarks and users.

Decides: the size of random values (outputs near 1 for inputs near 1, experts unlike each other).
Not handled here: inputs and routing; the self-test's layers, whose scales are calibrated.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import must
from .experts import ExpertWeights
from .formats import NVFP4
from .formats.nvfp4 import NVFP4Values
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
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **options: Any,
) -> ExpertWeights:
    """Return a layer of random weights, see `float_weights`, in NVFP4.

    Args:
        experts: those that are here; `num_experts` and `expert_offset` say of how many.
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
    return ExpertWeights.quantize(**named, activation=activation, **options)


def random_codes(layer: Layer, device: torch.device | str = "cpu", seed: int = 0) -> ExpertWeights:
    """Return random NVFP4 codes and block scales: a large layer at once, without float weights.

    Global scales make outputs near 1 for inputs near 1, activation scales are 1.

    Args:
        layer: its hidden_size and intermediate_size are multiples of 16.

    Raises:
        ShapeError: they are not.
    """
    sizes = (layer.hidden_size, layer.intermediate_size)
    if any(size % NVFP4.block_size for size in sizes):
        must(
            "random_codes: hidden_size and intermediate_size",
            f"be multiples of {NVFP4.block_size}",
            f"{sizes[0]} and {sizes[1]}",
            "Round them up, or use make_layer, which pads.",
        )
    generator = torch.Generator(device).manual_seed(seed)
    ones = torch.ones(layer.num_experts, dtype=torch.float32, device=device)

    def draw(low: int, high: int, rows: int, columns: int) -> torch.Tensor:
        shape = (layer.num_experts, rows, columns)
        return torch.randint(
            low, high, shape, dtype=torch.uint8, device=device, generator=generator
        )

    def values(rows: int, columns: int) -> NVFP4Values:
        # Block scales of 0.5 to 2, in steps of E4M3.
        scale = draw(0x30, 0x41, rows, NVFP4.scale_columns(columns)).view(NVFP4.scale_dtype)
        factor = ones.new_full((layer.num_experts,), columns**-0.5 / 3)
        return NVFP4Values(draw(0, 256, rows, NVFP4.packed_columns(columns)), scale, factor)

    return ExpertWeights(
        gate_up=values((1 + layer.gated) * layer.intermediate_size, layer.hidden_size),
        down=values(layer.hidden_size, layer.intermediate_size),
        activation=layer.activation,
        gated=layer.gated,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_experts=layer.num_experts,
        expert_offset=layer.expert_offset,
        hidden_scale=ones[:1].clone(),
        intermediate_scale=ones,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|, the root of the sums of squares of all elements.

    NaN where a value is NaN; where all that is expected is 0, 0 if actual is, else infinity.

    Raises:
        ShapeError: the shapes differ, or there is no element.
    """
    if actual.shape != expected.shape or not expected.numel():
        must(
            "relative_error: actual and expected",
            "have one shape with elements",
            f"{list(actual.shape)} and {list(expected.shape)}",
            "Compare a result with another of its shape.",
        )
    wanted = expected.detach().double()
    difference, size = (float(x.norm()) for x in (actual.detach().double() - wanted, wanted))
    if size == 0:
        return float("inf") if difference > 0 else difference
    return difference / size
