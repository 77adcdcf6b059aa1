"""Biases of experts: the definition, padding, slices, saved states and the operator's contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.kernels import get_kernel
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.reference import moe_definition, reference_w4a4

E, INNER, H, T, K = 4, 40, 56, 7, 2
CLAMPED = "silu(alpha=1.702,beta=1,limit=7)"


def floats(gated):
    named = {
        "up": torch.randn(E, INNER, H),
        "down": torch.randn(E, H, INNER),
        "up_bias": torch.randn(E, INNER),
        "down_bias": torch.randn(E, H),
    }
    if gated:
        named |= {"gate": torch.randn(E, INNER, H), "gate_bias": torch.randn(E, INNER)}
    return named


def routed():
    return torch.randn(T, H), torch.randint(-1, E + 1, (T, K)), torch.rand(T, K)


def by_loops(inputs, parts, clamped):
    """The formula of gpt-oss, or relu squared without a gate, pair by pair in float64."""
    hidden, ids, weights = (inputs[0].double(), inputs[1].tolist(), inputs[2].double())
    parts = {name: part.double() for name, part in parts.items()}
    out = torch.zeros(T, H, dtype=torch.float64)
    for token in range(T):
        for slot, expert in enumerate(ids[token]):
            if not 0 <= expert < E:
                continue
            up = parts["up"][expert] @ hidden[token] + parts["up_bias"][expert]
            if clamped:
                gate = parts["gate"][expert] @ hidden[token] + parts["gate_bias"][expert]
                gate = gate.clip(max=7)
                inner = gate / (1 + torch.exp(-1.702 * gate)) * (up.clip(-7, 7) + 1)
            else:
                inner = up.clip(min=0) ** 2
            y = parts["down"][expert] @ inner + parts["down_bias"][expert]
            out[token] += weights[token, slot] * y
    return out


def quantized(gated=True, **changes):
    activation = CLAMPED if gated else "relu2"
    return ExpertWeights.quantize(**(floats(gated) | {"activation": activation} | changes))


@pytest.mark.parametrize("gated", [True, False])
def test_the_definition(gated):
    inputs, parts = routed(), floats(gated)
    got = moe_definition(*inputs, **parts, activation=CLAMPED if gated else "relu2")
    # Three float32 products of at most 56 terms after one another; up to 1000 where squared.
    torch.testing.assert_close(got.double(), by_loops(inputs, parts, gated), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("how", ["fused_moe", "module", "compiled", "operator"])
def test_the_operator(gated, how):
    inputs, weights = routed(), quantized(gated)
    module = fp4moe.FusedExperts(weights, "reference")
    if how == "fused_moe":
        got = fp4moe.fused_moe(inputs[0], weights, *inputs[1:], kernel="reference")
    elif how == "module":
        got = module(*inputs)
    elif how == "compiled":
        got = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
    else:
        prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)
        args = (*inputs, *nvfp4_moe_arguments(prepared, "reference"))
        torch.library.opcheck(torch.ops.fp4moe.moe.default, args)
        got = torch.ops.fp4moe.moe.default(*args)
    want = by_loops(inputs, weights.dequantize(), gated)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


def test_absent_biases_have_size_0_and_give_the_same_bits():
    inputs = routed()
    weights = dataclasses.replace(quantized(), gate_up_bias=None, down_bias=None)
    assert not weights.biased and set(weights.dequantize()) == {"gate", "up", "down"}
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)
    operands, settings = nvfp4_moe_arguments(prepared, "reference")[:8], prepared.layer
    empty = torch.empty(0)
    args = (*operands[:3], empty, *operands[3:6], empty, *operands[6:])
    args += ("nvfp4", settings.activation, True, "reference", E, 0)
    torch.library.opcheck(torch.ops.fp4moe.moe.default, (*inputs, *args))
    want = fp4moe.fused_moe(inputs[0], weights, *inputs[1:], kernel="reference")
    assert torch.equal(torch.ops.fp4moe.moe(*inputs, *args), want)


@pytest.mark.parametrize("layout", ["gate_up", "up_gate_interleaved"])
def test_a_stacked_bias_follows_the_rows(layout):
    parts = floats(True)
    pair = {name: (parts.pop(f"gate{name}"), parts.pop(f"up{name}")) for name in ("", "_bias")}
    if layout == "gate_up":
        stacked = {f"gate_up{name}": torch.cat(halves, 1) for name, halves in pair.items()}
    else:
        stacked = {
            f"gate_up{name}": torch.stack(halves[::-1], 2).flatten(1, 2)
            for name, halves in pair.items()
        }
    options = {"activation": CLAMPED, **parts}
    got = ExpertWeights.quantize(**stacked, layout=layout, **options)
    apart = {
        f"{p}{n}": half
        for n, both in pair.items()
        for p, half in zip(("gate", "up"), both, strict=True)
    }
    want = ExpertWeights.quantize(**apart, **options)
    assert all(torch.equal(a, want.tensors()[name]) for name, a in got.tensors().items())
    torch.testing.assert_close(got.dequantize()["gate_bias"], pair["_bias"][0])


def test_one_bias_alone_brings_zeros_for_the_others():
    parts = {name: p for name, p in floats(True).items() if "bias" not in name}
    down_bias = torch.randn(E, H)
    weights = ExpertWeights.quantize(**parts, down_bias=down_bias, activation="silu")
    assert weights.gate_up_bias.eq(0).all() and torch.equal(weights.down_bias[:, :H], down_bias)


def test_padding_slices_and_states():
    inputs, weights = routed(), quantized()

    def run(part):
        return fp4moe.fused_moe(inputs[0], part, *inputs[1:], kernel="reference")

    want = run(weights)
    padded = weights.padded(hidden_multiple=128, intermediate_multiple=96)
    assert padded.gate_up_bias.shape == (E, 192) and padded.down_bias.shape == (E, 128)
    assert torch.equal(run(padded), want)
    again = padded.unpadded().tensors()
    assert all(torch.equal(t, again[name]) for name, t in weights.tensors().items())
    sliced = sum(run(weights.slice_intermediate(a, b)) for a, b in ((0, 16), (16, 48)))
    # The sum over the intermediate size in another order.
    torch.testing.assert_close(sliced, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        run(weights.slice_experts(0, 1)) + run(weights.slice_experts(1, E)), want
    )
    loaded = ExpertWeights.from_state_dict(weights.state_dict())
    assert torch.equal(run(loaded), want)
    module, other = fp4moe.FusedExperts(weights), fp4moe.FusedExperts(quantized())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*inputs), module(*inputs))
    assert torch.equal(module.gate_up_bias, weights.gate_up_bias)
    plain = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    assert fp4moe.FusedExperts(plain).down_bias is None


def test_w4a4_adds_them_too():
    inputs, weights = routed(), quantized(hidden_scale=0.01, intermediate_scale=0.05)
    biased = reference_w4a4(inputs[0], weights, *inputs[1:])
    zeros = {"gate_up_bias": torch.zeros(E, 96), "down_bias": torch.zeros(E, 64)}
    flat = dataclasses.replace(weights, **zeros)
    absent = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    plain = reference_w4a4(inputs[0], absent, *inputs[1:])
    assert torch.equal(reference_w4a4(inputs[0], flat, *inputs[1:]), plain)
    want = by_loops(inputs, weights.dequantize(), True)
    # 9.5 % RMS of a value in FP4, input and intermediate; without the biases far more.
    assert (biased - want).norm() < 0.2 * want.norm() < (plain - want).norm()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"up_bias": torch.zeros(E, INNER + 1)}, r"up_bias must be float \[4, 40\]"),
        ({"down_bias": torch.zeros(E, H, dtype=torch.int32)}, "down_bias must be float"),
        ({"gate_up_bias": torch.zeros(E, 2 * INNER)}, "biases must be either gate_up_bias, or"),
        ({"down_bias": torch.full((E, H), torch.inf)}, "down_bias must be finite"),
    ],
)
def test_biases_that_do_not_fit_are_named(change, message):
    with pytest.raises(ShapeError, match=f"^ExpertWeights.quantize: {message}"):
        quantized(**change)


def test_a_gate_bias_wants_a_gate():
    with pytest.raises(ShapeError, match="gate_bias must not be given without a gate"):
        quantized(False, gate_bias=torch.zeros(E, INNER))
    with pytest.raises(UnsupportedError, match="must be a plain one without a gate"):
        quantized(False, activation="silu(limit=7)")


def test_the_operator_names_a_bias_that_does_not_fit():
    prepared = get_kernel("reference").prepare(quantized(), hidden_alignment=256)
    args = [*routed(), *nvfp4_moe_arguments(prepared, "reference")]
    args[6] = args[6][:, :-1]
    with pytest.raises(ShapeError, match=r"^moe: gate_up_bias must be torch.float32 \[4, 96\]"):
        torch.ops.fp4moe.moe(*args)
