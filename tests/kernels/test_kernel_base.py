"""What the base class of kernels does once for all: devices, refusals of a call, scales."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from fused_layers import layer, with_biases

from fp4moe.errors import ShapeError
from fp4moe.kernels import KERNELS, Layer, base
from fp4moe.kernels.devices import Devices

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
RUNS_ON = {
    "flashinfer_trtllm": BLACKWELL,
    "flashinfer_cutlass": BLACKWELL,
    "triton": HOPPER,
    "humming": HOPPER,
}


@pytest.mark.parametrize(
    ("devices", "text", "inside", "outside"),
    [
        (Devices((AMPERE,), or_newer=True), "8.0 or newer", [AMPERE, (12, 1)], [None, (7, 5)]),
        (Devices((AMPERE,), up_to=HOPPER), "8.0 to 9.0", [AMPERE, (8, 9), HOPPER], [None, (9, 1)]),
        (Devices((HOPPER, BLACKWELL)), "9.0 or 10.0", [HOPPER, BLACKWELL], [None, (9, 5), (10, 3)]),
    ],
)
def test_devices(devices, text, inside, outside):
    assert str(devices) == text
    assert all(devices.include(c) and devices.reasons(c) == [] for c in inside)
    assert not any(devices.include(c) for c in outside)
    assert devices.reasons(None) == [f"needs compute capability {text}, got a CPU"]


@pytest.mark.parametrize("name", ["triton", "humming", "flashinfer_trtllm", "flashinfer_cutlass"])
@pytest.mark.parametrize("what", ["hidden", "intermediate"])
def test_operands_that_are_not_padded_are_refused(name, what, monkeypatch):
    package = "flashinfer" if name.startswith("flashinfer") else "triton"
    if not importlib.util.find_spec(package):
        pytest.skip(f"needs the package {package}")
    monkeypatch.setattr(base, "query_capability", lambda device: RUNS_ON[name])
    kernel, weights = KERNELS[name], layer(256, 192)
    prepared = kernel.prepare(weights, hidden_alignment=256)
    down = prepared.operands.down_packed
    down = down[:, :-16] if what == "hidden" else down[:, :, :-8]
    ids = torch.zeros(1, 2, dtype=torch.int64)
    call = prepared.call(torch.zeros(1, 128), ids, torch.ones(1, 2))
    call = call._replace(operands=call.operands._replace(down_packed=down))
    with pytest.raises(
        ShapeError, match=f"^moe: the padded {what} size must be .* for kernel {name}"
    ):
        kernel(call)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("name", "biased"),
    [
        (name, b)
        for name, kernel in KERNELS.items()
        for b in (False, True)
        if "nvfp4" in kernel.layouts and (not b or kernel.biases)
    ],
)
def test_updated_scales_are_those_of_weights_prepared_anew(name, gated, biased):
    kernel, activation = KERNELS[name], "silu" if gated else "relu2"
    # NVFP4, or the first format of a kernel that lacks it.
    format = "nvfp4" if "nvfp4" in kernel.layouts else next(iter(kernel.layouts))
    weights = layer(130, 100, activation=activation, gated=gated, format=format)
    weights = with_biases(weights) if biased else weights
    options = {"hidden_alignment": 256}
    old = kernel.prepare(weights, **options)
    new = {"hidden_scale": torch.tensor([0.7]), "intermediate_scale": torch.rand(4) + 0.1}
    expected = kernel.prepare(dataclasses.replace(weights, **new), hidden_alignment=256)
    changed = kernel.update_scales(old, *new.values())
    updated = old.replaced({**old.tensors(), **changed})
    for tensor_name, tensor in expected.tensors().items():
        assert torch.equal(updated.tensors()[tensor_name], tensor), tensor_name
    assert list(updated.kept) == list(expected.kept)
    restored = kernel.restore(updated)
    assert torch.equal(restored.hidden_scale, new["hidden_scale"])
    for logical in ("gate_up_bias", "down_bias") if biased else ():
        assert torch.equal(getattr(restored, logical), getattr(weights, logical))


def test_a_layer_is_read_off_any_object_that_has_its_facts():
    weights = layer(num_experts=9, expert_offset=3)
    assert Layer.of(weights, top_k=2) == weights.layer(2)
    assert Layer.of(weights) == weights.layer() != weights.layer(2)
    assert weights.metadata() == weights.layer(2).metadata()
    assert str(weights.layer()) == "gated silu, 9 experts of 256 x 192"
    assert weights.layer().on(None).endswith("256 x 192, CPU")
    assert weights.layer().on((9, 0)).endswith("256 x 192, 9.0")
