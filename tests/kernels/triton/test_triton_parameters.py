"""Kernel `triton` with biases and with activations that have parameters.

In the interpreter, which test_triton.py starts, and on a GPU. All is small, so that limits and caps
of about the size of the values show.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_layers import CUT, MODES, compare, interpreted, layer, relative

from fp4moe import ExpertWeights
from fp4moe.activations import ACTIVATIONS, get_activation
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.layer import Layer
from fp4moe.reference import reference

GPT_OSS = "silu(alpha=1.702,beta=1,limit=0.5)"
# (activation, gated, biased)
FORMS = [
    (GPT_OSS, True, True),
    (GPT_OSS, True, False),
    ("silu(limit=0.4)", True, False),
    ("silu_step(limit=0.2)", True, True),
    ("silu_softcap(alpha=0.6,beta=0.5)", True, True),
    ("gelu_tanh(beta=-0.5,limit=0.3)", True, True),
    ("silu(alpha=1.702)", False, True),
    ("relu2", False, True),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Three roundings to bfloat16 at most, each below 2^-9.
ROUNDED = 3 * 2.0**-9
TILES = sorted({c for layer in read(SHIPPED) for c in layer.tiles.values()}, key=str)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *(form[0] for form in FORMS)])
def test_the_kernel_has_it(activation, biased):
    layer = Layer(activation, True, 2880, 2880, 128, 4, biased=biased)
    assert TRITON.reasons_not_to_run(layer, (9, 0)) == list(TRITON.package_reasons())


@pytest.mark.parametrize("gated", [True, False])
def test_restore_undoes_prepare(gated):
    weights = layer(2, 80, 48, "silu(alpha=1.5)", gated, biased=True)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    assert prepared.operands.gate_up_bias.shape == (2, 64 * (1 + gated))
    assert prepared.operands.down_bias.shape == (2, 128)
    back = TRITON.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def without(weights, part):
    """The same layer with one of its parts left out, or None where it has no such part."""
    activation = get_activation(weights.activation)
    if part in ("gate_up_bias", "down_bias"):
        old = getattr(weights, part)
        return None if old is None else dataclasses.replace(weights, **{part: old * 0})
    plain = {"alpha": 1.0, "beta": 0.0, "limit": 0.0}
    # Caps cannot be left out, but doubled.
    plain |= {"limit": 2 * activation.limit} if activation.name == "silu_step" else {}
    if activation.name == "silu_softcap":
        plain |= {"alpha": 2 * activation.alpha, "beta": 2 * activation.beta}
    if getattr(activation, part) == plain[part]:
        return None
    changed = dataclasses.replace(activation, **{part: plain[part]})
    return dataclasses.replace(weights, activation=str(changed))


@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
def test_each_part_shows(activation, gated, biased):
    weights = layer(2, 80, 144, activation, gated, biased=biased)
    hidden, ids = torch.randn(5, 80) / 16, torch.randint(0, 2, (5, 2))
    expected = reference(hidden, weights, ids, torch.ones(5, 2))
    parts = ("gate_up_bias", "down_bias", "alpha", "beta", "limit")
    others = [other for part in parts if (other := without(weights, part))]
    assert others
    for other in others:
        changed = reference(hidden, other, ids, torch.ones(5, 2))
        assert relative(changed, expected) > 4 * CUT, other.activation


@interpreted
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
def test_small_layers(second, activation, gated, biased, poisoned_empty):
    window = {"num_experts": 4, "expert_offset": 1}
    weights = layer(2, 80, 144, activation, gated, biased=biased, **window)
    # Each form in two of the three modes.
    number = FORMS.index((activation, gated, biased))
    mode = list(MODES)[(number + second) % 3]
    compare(MODES[mode], weights, DTYPES[number % 3], 2, 2, CUT)


@interpreted
@pytest.mark.parametrize("tokens", [1, 35])
def test_one_token_and_many(tokens, poisoned_empty):
    # One expert, and 2 of 3 ids are not its: 16 to 32 of 70 slots with all but certainty.
    weights = layer(1, 64, 64, GPT_OSS, True, biased=True)
    compare(MODES["more"], weights, torch.bfloat16, tokens, 2, CUT)


def only_biases(device):
    """Experts whose matrices are zero, but for a down that sums the intermediate."""
    up, down = torch.zeros(2, 64, 64, device=device), torch.zeros(2, 64, 64, device=device)
    down[:, 0] = 1
    biases = {name: torch.zeros(2, 64, device=device) for name in ("up_bias", "gate_bias")}
    biases["gate_bias"][:, 5] = torch.tensor([3.0, 0.5], device=device)
    biases["up_bias"][:, 5] = torch.tensor([-1.5, 7.0], device=device)
    down_bias = torch.arange(128.0, device=device).reshape(2, 64)
    biases |= {"down_bias": down_bias}
    return ExpertWeights.quantize(
        up=up, gate=up, down=down, **biases, activation="relu(beta=1,limit=2)"
    )


def check_only_biases(config, device):
    # min(3, 2) * (-1.5 + 1) and min(0.5, 2) * (2 + 1), in column 0 only; all of it exact.
    weights = only_biases(device)
    ids = torch.tensor([[0, 1], [1, 1], [-1, 0], [2, -1]], device=device)
    routing_weights = torch.tensor([[0.5, 0.25], [1, 0.5], [1, 0.25], [1, 1]], device=device)
    expert = weights.down_bias.clone()
    expert[:, 0] += torch.tensor([-1.0, 1.5], device=device)
    first, second = expert
    expected = torch.stack((first / 2 + second / 4, second * 1.5, first / 4, first * 0))
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    call = prepared.call(torch.randn(4, 64, device=device), ids, routing_weights)
    assert torch.equal(run_with(config, call), expected)


def check_nan(config, activation, device):
    """A NaN of one token reaches that token's output, through every clamp, and no other."""
    weights = layer(2, 64, 64, activation, True, device, biased=True)
    hidden = torch.randn(3, 64, device=device).bfloat16()
    hidden[1, 7] = torch.nan
    ids = torch.tensor([[0], [1], [1]], device=device)
    call = TRITON.prepare(weights, hidden_alignment=256).call(hidden, ids, ids + 1.0)
    got = run_with(config, call)
    assert got.isnan().all(1).tolist() == [False, True, False]
    assert got[[0, 2]].isfinite().all()


@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_biases_by_hand(mode, poisoned_empty):
    check_only_biases(MODES[mode], "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", [form[0] for form in FORMS[2:6]])
def test_nan_passes_every_clamp(activation):
    check_nan(MODES["sorted"], activation, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33, 300, 2100])
@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
def test_on_the_gpu(activation, gated, biased, tokens, dtype, poisoned_empty):
    window = {"num_experts": 16, "expert_offset": 3}
    weights = layer(9, 336, 208, activation, gated, "cuda", biased=biased, **window)
    config = choose_tiles((9, 0), gated, 384, 256, 9, tokens * 5)
    compare(config, weights, dtype, tokens, 5, ROUNDED, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*TILES, MODES["more"]], ids=str)
@pytest.mark.parametrize(("activation", "gated"), [(GPT_OSS, True), ("relu2", False)])
def test_every_config_on_the_gpu(activation, gated, config):
    weights = layer(7, 256, 192, activation, gated, "cuda", biased=True)
    compare(config, weights, torch.bfloat16, 37, 4, ROUNDED, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_by_hand_on_the_gpu(mode, poisoned_empty):
    check_only_biases(MODES[mode], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [form[0] for form in FORMS[2:6]])
def test_nan_on_the_gpu(activation):
    check_nan(MODES["sorted"], activation, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300, 2100])
def test_biases_launch_nothing_more(tokens):
    counts = []
    for activation, biased in (("silu", False), (GPT_OSS, True)):
        weights = layer(4, 256, 192, activation, True, "cuda", biased=biased)
        ids = torch.randint(0, 4, (tokens, 2), device="cuda")
        hidden = torch.randn(tokens, 256, device="cuda").bfloat16()
        call = TRITON.prepare(weights, hidden_alignment=256).call(hidden, ids, ids + 1.0)
        TRITON(call)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            TRITON(call)
            torch.cuda.synchronize()
        counts.append(sum(e.name.endswith("_kernel") for e in profile.events()))
    assert counts[0] == counts[1] >= 2
