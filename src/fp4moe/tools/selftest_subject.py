"""A layer with random weights, inputs and the reference's answers, which a self-test checks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from ..activations import get_activation
from ..experts import ExpertWeights
from ..formats import DEFAULT_FORMAT, FORMATS
from ..kernels import get_kernel
from ..module import FusedExperts
from ..reference import reference, reference_w4a4
from ..resize import stack_experts

__all__ = ["BF16_ROUNDING", "Subject", "make_subject"]

# Relative RMS of one rounding to bfloat16, at most: half a step of 2^-7 is uniform noise.
BF16_ROUNDING = 2**-7 / 12**0.5
# A W4A16 kernel may round input, weights, both products, the intermediate and two sums; relu2
# doubles the first ones: sqrt(3 * 4 + 4) = 4 roundings, and a margin of 2.
W4A16 = 8 * BF16_ROUNDING
# W4A4: approximate reciprocals move values across a rounding boundary. Rounding all of them anew
# would give 0.2, a wrong layout more.
W4A4 = 5e-2
# Activations of 8 bits: with an intermediate in bfloat16 one code in 50 is its neighbour, a step of
# 2^-3.5, which gives 0.012 for each of two roundings, beside W4A16. No rounding would give 0.04.
W8A8 = 3e-2
# FP8 blocks: TRT-LLM-Gen rounds gate and up, too, before they are combined: 0.027 each.
ROUNDED_GATE_AND_UP = 6e-2


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One layer, and the kernel that must compute it.

    Attributes:
        kernel: its name.
        weights: quantised, logical layout.
        hidden: [at least max(tokens), H] bfloat16.
        tokens: numbers of tokens to try.
    """

    kernel: str
    weights: ExpertWeights
    hidden: torch.Tensor
    top_k: int
    tokens: tuple[int, ...]
    hidden_alignment: int

    @functools.cached_property
    def module(self) -> FusedExperts:
        """The layer as a user has it."""
        return self.fused(self.weights)

    @property
    def limit(self) -> float:
        """Largest relative RMS against the definition."""
        if not self.quantizes_activations:
            return W4A16
        format = self.weights.number_format
        if format.activation_bits == 4:
            return W4A4
        in_blocks = format.scales is not None and format.scales.rows not in (None, 1)
        return ROUNDED_GATE_AND_UP if in_blocks else W8A8

    @property
    def quantizes_activations(self) -> bool:
        """Whether the kernel's definition is reference_w4a4."""
        return get_kernel(self.kernel).quantizes_activations

    @property
    def probe(self) -> int:
        """Number of tokens of the checks that take one number only."""
        positive = [t for t in self.tokens if t]
        return max((t for t in positive if t <= 128), default=min(positive))

    def fused(self, weights: ExpertWeights) -> FusedExperts:
        """Prepare other weights for the same kernel."""
        return FusedExperts(
            weights, self.kernel, hidden_alignment=self.hidden_alignment, top_k=self.top_k
        )

    def expected(self, weights: ExpertWeights, *inputs: torch.Tensor) -> torch.Tensor:
        """Compute the definition of (hidden, expert ids, routing weights)."""
        hidden, expert_ids, routing_weights = inputs
        if not self.quantizes_activations:
            return reference(hidden, weights, expert_ids, routing_weights)
        return reference_w4a4(
            hidden,
            weights,
            expert_ids,
            routing_weights,
            intermediate_dtype=get_kernel(self.kernel).intermediate_dtype_for(self.weights.format),
            product_dtype=get_kernel(self.kernel).product_dtype,
        )

    def inputs(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden [T, H], distinct expert ids [T, K], routing weights [T, K] of sum 1."""
        generator = self.generator(seed)
        shape, device = (tokens, self.weights.num_experts), self.hidden.device
        scores = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
        ids = scores.argsort(1)[:, : self.top_k].contiguous()
        weights = (
            torch.rand(ids.shape, generator=generator, dtype=torch.float32, device=device) + 0.25
        )
        hidden = self.hidden.roll(-seed, 0)[:tokens]
        return hidden.contiguous(), ids, weights / weights.sum(1, keepdim=True)

    def generator(self, seed: int) -> torch.Generator:
        """Return the random state of one check."""
        return torch.Generator(self.hidden.device).manual_seed(seed)


def make_subject(
    kernel: str,
    sizes: dict[str, Any],
    *,
    device: torch.device,
    tokens: tuple[int, ...],
    hidden_alignment: int,
) -> Subject:
    """Make a random layer, one expert at a time, with calibrated activation scales.

    Args:
        sizes: activation, gated, hidden_size, intermediate_size, num_experts, top_k, biased where
            the experts have biases, and format of their weights.
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device=device)
    hidden = normal(max(64, *tokens), sizes["hidden_size"]).bfloat16()
    format = sizes.get("format", DEFAULT_FORMAT)
    stored_range = FORMATS[format].activation_range

    def calibrated(x: torch.Tensor) -> float:
        # Not the amax itself: bfloat16 inputs would then often lie on a rounding boundary.
        return 1.03 * float(x.abs().max()) / stored_range if stored_range else 1.0

    combine, biased = get_activation(sizes["activation"]).combine, sizes.get("biased", False)
    x, shape = hidden[:64].float(), (sizes["intermediate_size"], sizes["hidden_size"])

    def one(expert: int) -> ExpertWeights:
        # Unlike experts: a scale that is shared or permuted among them shows.
        gain = 2.0 ** (expert % 5 / 2 - 1) * shape[1] ** -0.5
        matrices = {name: normal(shape) * gain for name in ("up", "gate")[: 1 + sizes["gated"]]}
        # Of half the size of what they are added to.
        biases = {f"{name}_bias": normal(shape[0]) / 2 for name in matrices if biased}
        products = {n: x @ m.T + biases.get(f"{n}_bias", 0.0) for n, m in matrices.items()}
        y = combine(products["up"], products.get("gate"))
        # Outputs are alike in size: a wrong expert shows whichever it is.
        gain = 2.0 ** (expert % 3 / 2 - 0.5) * shape[0] ** -0.5 / float(y.square().mean().sqrt())
        down = normal(shape[::-1]) * gain
        biases |= {"down_bias": normal(shape[1]) / 2} if biased else {}
        return ExpertWeights.quantize(
            **{name: tensor[None] for name, tensor in (matrices | biases).items()},
            down=down[None],
            activation=sizes["activation"],
            format=format,
            hidden_scale=calibrated(hidden),
            intermediate_scale=calibrated(y),
        )

    weights = stack_experts(sizes["num_experts"], one)
    return Subject(kernel, weights, hidden, sizes["top_k"], tokens, hidden_alignment)
