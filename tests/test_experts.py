"""ExpertWeights: every way to quantise, padding, slicing, saving, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from refusals import assert_refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp4moe import fused_moe
from fp4moe.activations import ACTIVATIONS, PAIRED
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.experts import GATE_UP_LAYOUTS, ExpertWeights, split_gate_up
from fp4moe.formats import FORMATS
from fp4moe.formats.nvfp4 import NVFP4Values, dequantize_nvfp4, quantize_nvfp4
from fp4moe.reference import moe_definition, reference, reference_w4a4

L, I, H = 3, 32, 48  # noqa: E741


def coarse(*shape):
    """Random numbers that float32, bfloat16 and float16 all hold exactly."""
    return torch.randint(-127, 128, shape) / 64.0


def float_weights(local=L, intermediate=I, hidden=H, gated=True):
    named = {"up": coarse(local, intermediate, hidden), "down": coarse(local, hidden, intermediate)}
    return named | ({"gate": coarse(local, intermediate, hidden)} if gated else {})


def quantized(*sizes, gated=True, activation="silu", **kwargs):
    return ExpertWeights.quantize(
        **float_weights(*sizes, gated=gated), activation=activation, **kwargs
    )


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same(a: ExpertWeights, b: ExpertWeights) -> None:
    assert a.metadata() == b.metadata()
    mine, theirs = a.tensors(), b.tensors()
    assert list(mine) == list(theirs)
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(raw(mine[name]), raw(theirs[name])), name


def routed(tokens, experts, top_k=2, hidden=H):
    ids = torch.randint(0, experts, (tokens, top_k))
    return torch.randn(tokens, hidden), ids, torch.rand(tokens, top_k)


# Quantising.


def stack(gate, up, layout):
    """gate_up [L, 2 I, H] in the given order, row by row."""
    halves = (gate, up) if layout.startswith("gate") else (up, gate)
    if layout.endswith("interleaved"):
        rows = [half[:, i] for i in range(gate.shape[1]) for half in halves]
    else:
        rows = [half[:, i] for half in halves for i in range(gate.shape[1])]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_every_way_to_give_the_weights_gives_the_same_bytes(dtype, method):
    named = float_weights(intermediate=40)  # 40 is no multiple of 16
    common = {"activation": "silu", "method": method}
    want = ExpertWeights.quantize(**named, **common)
    cast = {name: w.to(dtype) for name, w in named.items()}
    assert_same(ExpertWeights.quantize(**cast, **common), want)
    turned = {name: w.transpose(1, 2).contiguous() for name, w in cast.items()}
    assert_same(ExpertWeights.quantize(**turned, transposed=True, **common), want)
    for layout in GATE_UP_LAYOUTS:
        gate_up = stack(cast["gate"], cast["up"], layout)
        split = split_gate_up(gate_up, layout)
        assert torch.equal(split[0], cast["gate"]) and torch.equal(split[1], cast["up"])
        form = {"layout": layout, **common}
        got = ExpertWeights.quantize(gate_up=gate_up, down=cast["down"], **form)
        assert_same(got, want)
        got = ExpertWeights.quantize(
            gate_up=gate_up.transpose(1, 2).contiguous(),
            down=turned["down"],
            transposed=True,
            **form,
        )
        assert_same(got, want)


def test_the_default_layout_is_gate_first():
    named = float_weights()
    gate_up = torch.cat((named["gate"], named["up"]), 1)
    got = ExpertWeights.quantize(gate_up=gate_up, down=named["down"], activation="gelu")
    assert_same(got, ExpertWeights.quantize(**named, activation="gelu"))


def test_not_gated():
    named = float_weights(gated=False)
    weights = ExpertWeights.quantize(**named, activation="relu2")
    assert not weights.gated and weights.gate_up.packed.shape == (L, I, H // 2)
    assert set(weights.dequantize()) == {"up", "down"}


@pytest.mark.parametrize("gated", [True, False])
def test_the_values_are_those_of_quantize_nvfp4(gated):
    named = float_weights(gated=gated)
    weights = ExpertWeights.quantize(**named, activation="silu")
    decoded = weights.dequantize()
    assert set(decoded) == set(named)
    first = [named[name] for name in ("gate", "up") if name in named]
    for e in range(L):
        # One scale for gate and up of an expert, from the largest magnitude of both.
        amax = max(w[e].abs().max() for w in first)
        assert weights.gate_up.global_scale[e] == amax / torch.tensor(2688.0)
        assert weights.down.global_scale[e] == named["down"][e].abs().max() / torch.tensor(2688.0)
        for name, w in named.items():
            values = weights.down if name == "down" else weights.gate_up
            want = dequantize_nvfp4(quantize_nvfp4(w[e], values.global_scale[e]))
            assert torch.equal(decoded[name][e], want)
    low = weights.dequantize(torch.bfloat16)
    assert all(torch.equal(low[name], decoded[name].bfloat16()) for name in named)


@pytest.mark.parametrize("zero", ["gate", "up"])
def test_an_all_zero_half_does_not_coarsen_the_other(zero):
    named = {name: w / 100 for name, w in float_weights().items()}
    named[zero][1] = 0
    other = named["up" if zero == "gate" else "gate"]
    weights = ExpertWeights.quantize(**named, activation="silu")
    assert weights.gate_up.global_scale[1] == other[1].abs().max() / torch.tensor(2688.0)
    error = (weights.dequantize()["up" if zero == "gate" else "gate"] - other)[1]
    assert error.norm() < 0.12 * other[1].norm()
    assert weights.dequantize()[zero][1].eq(0).all()


def test_an_all_zero_expert():
    named = float_weights()
    for w in named.values():
        w[2] = 0
    weights = ExpertWeights.quantize(**named, activation="silu")
    assert weights.gate_up.global_scale[2] == weights.down.global_scale[2] == 1
    assert all(w[2].eq(0).all() and w[1].ne(0).any() for w in weights.dequantize().values())


@pytest.mark.parametrize("sizes", [(I, 40), (24, H), (5, 17), (1, 1)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_sizes_that_are_no_multiple_of_16(sizes, gated):
    intermediate, hidden = sizes
    named = float_weights(L, intermediate, hidden, gated)
    weights = ExpertWeights.quantize(**named, activation="silu")
    assert (weights.hidden_size, weights.intermediate_size) == (hidden, intermediate)
    h, i = weights.hidden_padded, weights.intermediate_padded
    assert (h, i) == (-(-hidden // 16) * 16, -(-intermediate // 16) * 16)
    # The bytes are those of weights that were padded by hand, where zeros cost nothing.
    pad = torch.nn.functional.pad
    big = {
        name: pad(w, (0, i - intermediate, 0, h - hidden))
        if name == "down"
        else pad(w, (0, h - hidden, 0, i - intermediate))
        for name, w in named.items()
    }
    by_hand = ExpertWeights.quantize(**big, activation="silu")
    for gemm in ("gate_up", "down"):
        mine, theirs = getattr(weights, gemm), getattr(by_hand, gemm)
        assert torch.equal(mine.packed, theirs.packed)
        assert torch.equal(mine.global_scale, theirs.global_scale)
        # quantize_nvfp4 gives a block of zeros scale 1, the padding has scale 0.
        a, b = mine.block_scale.float(), theirs.block_scale.float()
        zero_block = theirs.packed.unflatten(-1, (-1, 8)).eq(0).all(-1)
        assert torch.equal(a[~zero_block], b[~zero_block])
    x, ids, routing = routed(7, L, hidden=hidden)
    want = moe_definition(x, ids, routing, **weights.dequantize(), activation="silu")
    assert torch.equal(reference(x, weights, ids, routing), want)
    assert fused_moe(x, weights, ids, routing).shape == (7, hidden)


def test_activation_scales():
    one = quantized()
    assert one.hidden_scale.tolist() == [1.0] and one.intermediate_scale.tolist() == [1.0] * L
    each = torch.nn.Parameter(torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64))
    weights = quantized(hidden_scale=0.125, intermediate_scale=each)
    assert weights.hidden_scale.tolist() == [0.125]
    assert weights.intermediate_scale.tolist() == [0.5, 0.25, 2.0]
    assert not any(t.requires_grad for t in weights.tensors().values())
    assert all(t.is_contiguous() for t in weights.tensors().values())
    with torch.no_grad():
        each.fill_(9)  # a copy was taken
    assert weights.intermediate_scale.tolist() == [0.5, 0.25, 2.0]


def test_parameters_are_accepted_and_left_alone():
    named = {name: torch.nn.Parameter(w) for name, w in float_weights().items()}
    before = {name: w.detach().clone() for name, w in named.items()}
    weights = ExpertWeights.quantize(**named, activation="silu")
    assert_same(weights, ExpertWeights.quantize(**before, activation="silu"))
    assert all(torch.equal(named[name], before[name]) for name in named)


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in live storages that operators made."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in inputs}
        self.live: dict[int, tuple] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                ref = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.live[storage._cdata] = (ref, storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_quantising_streams_one_expert_at_a_time(transposed):
    extra = {}
    for local in (8, 32):
        named = {
            name: torch.randn(local, 512, 512, dtype=torch.bfloat16)
            for name in ("gate", "up", "down")
        }
        with LiveBytes(*named.values()) as live:
            weights = ExpertWeights.quantize(**named, activation="silu", transposed=transposed)
        extra[local] = live.peak - weights.nbytes
    # A float32 copy of one of the tensors alone would be 33.5 MB.
    assert extra[32] < 9e6
    assert extra[32] == pytest.approx(extra[8], abs=1e4)


# Sizes.


@pytest.mark.parametrize("gated", [True, False])
def test_nbytes_is_four_and_a_half_bits_a_weight(gated):
    weights = quantized(4, 64, 96, gated=gated)
    parameters = 4 * 64 * 96 * (3 if gated else 2)
    assert parameters * 4.5 / 8 == 4 * 64 * 96 * (3 if gated else 2) * 9 // 16
    # Per expert two global scales and one of its intermediate; one for the input.
    assert weights.nbytes == parameters * 9 // 16 + 4 * (3 * 4 + 1)
    assert weights.local_experts == 4 and weights.device.type == "cpu"


# Padding and slicing.


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("compute", [reference, reference_w4a4])
def test_padding_is_exact(gated, compute):
    weights = quantized(L, 40, 56, gated=gated, activation="gelu_tanh")
    big = weights.padded(hidden_multiple=128, intermediate_multiple=96)
    assert (big.hidden_padded, big.intermediate_padded) == (128, 96)
    assert (big.hidden_size, big.intermediate_size) == (56, 40)
    h, i = weights.hidden_padded, weights.intermediate_padded
    for part, per_byte in (("packed", 2), ("block_scale", 16)):
        first = getattr(big.gate_up, part).view(torch.uint8).unflatten(1, (1 + gated, -1))
        second = getattr(big.down, part).view(torch.uint8)
        small = getattr(weights.gate_up, part).view(torch.uint8).unflatten(1, (1 + gated, -1))
        # Each half starts where it should, and all around it is zero.
        assert torch.equal(first[:, :, :i, : h // per_byte], small)
        assert first[:, :, i:].eq(0).all() and first[..., h // per_byte :].eq(0).all()
        small = getattr(weights.down, part).view(torch.uint8)
        assert torch.equal(second[:, :h, : i // per_byte], small)
        assert second[:, h:].eq(0).all() and second[..., i // per_byte :].eq(0).all()
        assert first.shape[2] == 96 and first.shape[3] * per_byte == 128
    assert torch.equal(big.gate_up.global_scale, weights.gate_up.global_scale)
    for name, w in weights.dequantize().items():
        assert torch.equal(big.dequantize()[name], w)
    x, ids, routing = routed(9, L, hidden=56)
    args = x, weights, ids, routing
    want, got = compute(*args), compute(x, big, ids, routing)
    assert torch.equal(got, want)


def test_padding_to_what_is_there_changes_nothing():
    weights = quantized()
    assert weights.padded() is weights
    assert weights.padded(hidden_multiple=48, intermediate_multiple=32) is weights


@pytest.mark.parametrize("gated", [True, False])
def test_expert_slices_sum_to_the_whole(gated):
    weights = quantized(5, I, H, gated=gated, num_experts=9, expert_offset=2)
    x, ids, routing = routed(31, 9, top_k=3)
    parts = [weights.slice_experts(a, b) for a, b in ((0, 1), (1, 4), (4, 5))]
    assert [p.expert_offset for p in parts] == [2, 3, 6]
    assert [p.local_experts for p in parts] == [1, 3, 1]
    assert all(p.num_experts == 9 for p in parts)
    shared = weights.gate_up.packed.untyped_storage().data_ptr()
    assert all(p.gate_up.packed.untyped_storage().data_ptr() == shared for p in parts)
    total = sum(fused_moe(x, p, ids, routing).double() for p in parts)
    whole = fused_moe(x, weights, ids, routing)
    # The same terms, added in another order.
    torch.testing.assert_close(total.float(), whole, rtol=1e-5, atol=1e-4)
    assert all(fused_moe(x, p, ids, routing).ne(0).any() for p in parts)


@pytest.mark.parametrize("gated", [True, False])
def test_intermediate_slices_sum_to_the_whole(gated):
    weights = quantized(L, 72, H, gated=gated, activation="gelu", intermediate_scale=0.5)
    x, ids, routing = routed(31, L)
    cuts = (0, 16, 64, 80)
    parts = [weights.slice_intermediate(a, b) for a, b in itertools.pairwise(cuts)]
    assert [p.intermediate_padded for p in parts] == [16, 48, 16]
    assert [p.intermediate_size for p in parts] == [16, 48, 8]
    decoded = weights.dequantize()
    for part, (a, b) in zip(parts, ((0, 16), (16, 64), (64, 72)), strict=True):
        for name, w in part.dequantize().items():
            want = decoded[name][..., a:b] if name == "down" else decoded[name][:, a:b]
            assert torch.equal(w, want), name
    total = sum(fused_moe(x, p, ids, routing).double() for p in parts)
    whole = fused_moe(x, weights, ids, routing)
    scale = whole.abs().max()
    torch.testing.assert_close(total.float() / scale, whole / scale, rtol=0, atol=1e-6)


def test_a_slice_of_padding_alone_contributes_nothing():
    big = quantized().padded(intermediate_multiple=64)
    part = big.slice_intermediate(48, 64)
    x, ids, routing = routed(5, L)
    assert fused_moe(x, part, ids, routing).eq(0).all()


def test_a_slice_can_be_padded_saved_and_sliced_again():
    weights = quantized(L, 64, H)
    part = weights.slice_intermediate(16, 48).slice_experts(1, 3)
    assert_same(part, weights.slice_experts(1, 3).slice_intermediate(16, 48))
    x, ids, routing = routed(9, L)
    big = part.padded(hidden_multiple=128, intermediate_multiple=128)
    want = reference(x, part, ids, routing)
    torch.testing.assert_close(reference(x, big, ids, routing), want, rtol=1e-5, atol=1e-4)
    assert_same(ExpertWeights.from_state_dict(part.state_dict()), part)


# Saving.


def test_state_dict_round_trips(tmp_path):
    weights = quantized(num_experts=7, expert_offset=2, intermediate_scale=0.5)
    state = weights.state_dict()
    assert_same(ExpertWeights.from_state_dict(state), weights)
    assert set(state) == {*weights.tensors(), "metadata"}
    assert state["metadata"] == {
        "format": "nvfp4",
        "activation": "silu",
        "gated": True,
        "hidden_size": H,
        "intermediate_size": I,
        "num_experts": 7,
        "expert_offset": 2,
    }
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_same(ExpertWeights.from_state_dict(loaded), weights)
    torch.save(weights, tmp_path / "weights.pt")
    assert_same(torch.load(tmp_path / "weights.pt", weights_only=False), weights)
    assert_same(copy.deepcopy(weights), weights)
    assert_same(ExpertWeights.from_tensors(weights.tensors(), weights.metadata()), weights)


def test_to_another_device():
    weights = quantized(num_experts=7, expert_offset=2)
    there = weights.to("meta")
    assert there.device.type == "meta" and there.metadata() == weights.metadata()
    assert all(t.is_meta for t in there.tensors().values())
    assert_same(weights.to("cpu"), weights)


def test_frozen():
    weights = quantized()
    for field in dataclasses.fields(weights):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(weights, field.name, None)


# Refusals.


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


def bad_value(name, value, dtype=torch.float32):
    named = {k: w.to(dtype) for k, w in float_weights().items()}
    named[name][1, 2, 3] = value
    return lambda: ExpertWeights.quantize(**named, activation="silu")


def change(**fields):
    """A call that builds sound weights with some fields replaced."""
    return lambda: dataclasses.replace(quantized(), **fields)


Q = "ExpertWeights.quantize: "
FORMS = "arguments must be either gate_up, or up with an optional gate; got "
REFUSED = {
    "nothing": (
        lambda: ExpertWeights.quantize(down=zeros(1, 16, 16), activation="silu"),
        f"{Q}{FORMS}[]. Pass one of the two forms.",
    ),
    "gate without up": (
        lambda: ExpertWeights.quantize(
            gate=zeros(1, 16, 16), down=zeros(1, 16, 16), activation="silu"
        ),
        f"{Q}{FORMS}['gate']. Pass one of the two forms.",
    ),
    "both forms": (
        lambda: ExpertWeights.quantize(
            up=zeros(1, 16, 16),
            gate_up=zeros(1, 32, 16),
            down=zeros(1, 16, 16),
            activation="silu",
        ),
        f"{Q}{FORMS}['up', 'gate_up']. Pass one of the two forms.",
    ),
    "gate beside gate_up": (
        lambda: ExpertWeights.quantize(
            gate=zeros(1, 16, 16),
            gate_up=zeros(1, 32, 16),
            down=zeros(1, 16, 16),
            activation="silu",
        ),
        f"{Q}{FORMS}['gate', 'gate_up']. Pass one of the two forms.",
    ),
    "odd gate_up": (
        lambda: ExpertWeights.quantize(
            gate_up=zeros(1, 33, 16), down=zeros(1, 16, 16), activation="silu"
        ),
        f"{Q}gate_up must have shape [L, 2 * I, H] ([L, H, 2 * I] when transposed); got "
        "[1, 33, 16]. Stack gate and up on the output axis.",
    ),
    "2-D gate_up": (
        lambda: ExpertWeights.quantize(
            gate_up=zeros(32, 16), down=zeros(1, 16, 16), activation="silu", transposed=True
        ),
        f"{Q}gate_up must have shape [L, 2 * I, H] ([L, H, 2 * I] when transposed); got "
        "[32, 16]. Stack gate and up on the output axis.",
    ),
    "layout": (
        lambda: ExpertWeights.quantize(
            gate_up=zeros(1, 32, 16), down=zeros(1, 16, 16), activation="silu", layout="up"
        ),
        "ExpertWeights.quantize: layout must be one of gate_up, up_gate, gate_up_interleaved, "
        "up_gate_interleaved; got 'up'. Pass the order in which the rows are stored.",
    ),
    "2-D up": (
        lambda: ExpertWeights.quantize(up=zeros(16, 16), down=zeros(1, 16, 16), activation="silu"),
        f"{Q}up must have shape [L, I, H]; got [16, 16]. Stack the experts on axis 0.",
    ),
    "1-D up, transposed": (
        lambda: ExpertWeights.quantize(
            up=zeros(16), down=zeros(1, 16, 16), activation="silu", transposed=True
        ),
        f"{Q}up must have shape [L, I, H]; got [16]. Stack the experts on axis 0.",
    ),
    "no expert": (
        lambda: ExpertWeights.quantize(
            up=zeros(0, 16, 16), down=zeros(0, 16, 16), activation="silu"
        ),
        f"{Q}up must not be empty; got [0, 16, 16]. Pass at least one expert with weights.",
    ),
    "down of another size": (
        lambda: ExpertWeights.quantize(
            up=zeros(2, 16, 32), down=zeros(2, 16, 32), activation="silu"
        ),
        f"{Q}down must have shape [2, 32, 16] to match up [L, I, H] = [2, 16, 32]; got "
        "[2, 16, 32]. Check the order of the axes (transposed=).",
    ),
    "gate of other experts": (
        lambda: ExpertWeights.quantize(
            up=zeros(2, 16, 32), gate=zeros(3, 16, 32), down=zeros(2, 32, 16), activation="silu"
        ),
        f"{Q}gate must have shape [2, 16, 32] to match up [L, I, H] = [2, 16, 32]; got "
        "[3, 16, 32]. Check the order of the axes (transposed=).",
    ),
    "down of other experts": (
        lambda: ExpertWeights.quantize(
            up=zeros(2, 16, 32), down=zeros(3, 32, 16), activation="silu"
        ),
        f"{Q}down must have shape [2, 32, 16] to match up [L, I, H] = [2, 16, 32]; got "
        "[3, 32, 16]. Check the order of the axes (transposed=).",
    ),
    "integers": (
        lambda: ExpertWeights.quantize(
            up=zeros(1, 16, 16, dtype=torch.int32), down=zeros(1, 16, 16), activation="silu"
        ),
        f"{Q}up must be bfloat16, float16, float32 or float64; got torch.int32. "
        "Dequantise it first.",
    ),
    "float8": (
        lambda: ExpertWeights.quantize(
            up=zeros(1, 16, 16),
            down=zeros(1, 16, 16).to(torch.float8_e4m3fn),
            activation="silu",
        ),
        f"{Q}down must be bfloat16, float16, float32 or float64; got torch.float8_e4m3fn. "
        "Dequantise it first.",
    ),
    "devices": (
        lambda: ExpertWeights.quantize(
            up=zeros(1, 16, 16), down=zeros(1, 16, 16, device="meta"), activation="silu"
        ),
        f"{Q}down must be on the device of up, cpu; got meta. Move it there.",
    ),
    "meta": (
        lambda: ExpertWeights.quantize(
            up=zeros(1, 16, 16, device="meta"),
            down=zeros(1, 16, 16, device="meta"),
            activation="silu",
        ),
        f"{Q}up must hold values; got a meta tensor. Load the checkpoint first.",
    ),
    "hidden_scale": (
        lambda: quantized(hidden_scale=0.0),
        f"{Q}hidden_scale must be positive and finite, one value or 1; got 0.0. "
        "Pass amax / 2688, or 1.0 where it is unknown.",
    ),
    "intermediate_scale": (
        lambda: quantized(intermediate_scale=math.nan),
        f"{Q}intermediate_scale must be positive and finite, one value or 3; got nan. "
        "Pass amax / 2688, or 1.0 where it is unknown.",
    ),
    "two intermediate scales of three": (
        lambda: quantized(intermediate_scale=torch.ones(2)),
        f"{Q}intermediate_scale must be positive and finite, one value or 3; got "
        "tensor([1., 1.]). Pass amax / 2688, or 1.0 where it is unknown.",
    ),
    "offset": (
        lambda: quantized(num_experts=4, expert_offset=2),
        "ExpertWeights: expert_offset must lie in 0..1 for 3 of 4 experts; got 2. "
        "Pass the global id of the first local expert.",
    ),
    "expert slice": (
        lambda: quantized().slice_experts(1, 4),
        "ExpertWeights.slice_experts: start and stop must satisfy 0 <= start < stop <= 3; "
        "got 1 and 4. Pass local indices.",
    ),
    "empty expert slice": (
        lambda: quantized().slice_experts(1, 1),
        "ExpertWeights.slice_experts: start and stop must satisfy 0 <= start < stop <= 3; "
        "got 1 and 1. Pass local indices.",
    ),
    "slice inside a block": (
        lambda: quantized().slice_intermediate(8, 32),
        "ExpertWeights.slice_intermediate: start and stop must be multiples of 16 with "
        "0 <= start < stop <= 32; got 8 and 32. Move them to a block boundary.",
    ),
    "slice beyond the end": (
        lambda: quantized().slice_intermediate(16, 48),
        "ExpertWeights.slice_intermediate: start and stop must be multiples of 16 with "
        "0 <= start < stop <= 32; got 16 and 48. Move them to a block boundary.",
    ),
    "padding": (
        lambda: quantized().padded(hidden_multiple=24),
        "ExpertWeights.padded: hidden_multiple must be a multiple of 16; got 24. Round it up.",
    ),
    "no padding": (
        lambda: quantized().padded(intermediate_multiple=0),
        "ExpertWeights.padded: intermediate_multiple must be a multiple of 16; got 0. Round it up.",
    ),
    "no hidden size": (
        change(hidden_size=0),
        "ExpertWeights: hidden_size and intermediate_size must lie in 1 to the padded 48 and 32; "
        "got 0 and 32. Pass the unpadded sizes of the model.",
    ),
    "larger than padded": (
        change(intermediate_size=33),
        "ExpertWeights: hidden_size and intermediate_size must lie in 1 to the padded 48 and 32; "
        "got 48 and 33. Pass the unpadded sizes of the model.",
    ),
    "gated or not": (
        change(gated=False),
        "ExpertWeights: gate_up.packed must be torch.uint8 [3, 32, 24] on cpu; got torch.uint8 "
        "[3, 64, 24] on cpu. Build it with ExpertWeights.quantize.",
    ),
    "experts disagree": (
        change(down=quantized(2).down),
        "ExpertWeights: down.packed must be torch.uint8 [3, 48, 16] on cpu; got torch.uint8 "
        "[2, 48, 16] on cpu. Build it with ExpertWeights.quantize.",
    ),
    "scale dtype": (
        change(hidden_scale=torch.ones(1, dtype=torch.float64)),
        "ExpertWeights: hidden_scale must be torch.float32 [1] on cpu; got torch.float64 [1] on "
        "cpu. Build it with ExpertWeights.quantize.",
    ),
    "scale device": (
        change(intermediate_scale=torch.ones(3, device="meta")),
        "ExpertWeights: intermediate_scale must be torch.float32 [3] on cpu; got torch.float32 "
        "[3] on meta. Build it with ExpertWeights.quantize.",
    ),
    "2-D packed": (
        change(down=NVFP4Values(*(t[0] for t in dataclasses.astuple(quantized().down)))),
        "ExpertWeights: gate_up.packed and down.packed must have 3 axes; got [3, 64, 24] and "
        "[48, 16]. Build it with ExpertWeights.quantize.",
    ),
    "no metadata": (
        lambda: ExpertWeights.from_state_dict(quantized().tensors()),
        "ExpertWeights.from_state_dict: state must hold ['down.block_scale', "
        "'down.global_scale', 'down.packed', 'gate_up.block_scale', 'gate_up.global_scale', "
        "'gate_up.packed', 'hidden_scale', 'intermediate_scale'] and metadata with a "
        f"format of {', '.join(FORMATS)}; got None, without",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    assert_refused(*REFUSED[case])


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_name_the_argument_and_the_expert(name, value, dtype):
    with pytest.raises(ShapeError) as error:
        bad_value(name, value, dtype)()
    start = f"ExpertWeights.quantize: {name} of expert 1 must be finite in float32; got values "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(" Find the layer that made them.")
    assert str(value) in str(error.value)


def test_float64_beyond_float32_is_not_finite():
    with pytest.raises(ShapeError, match="up of expert 1 must be finite in float32"):
        bad_value("up", 1e39, torch.float64)()


@pytest.mark.parametrize("change", ["missing", "unexpected", "format"])
def test_a_state_that_does_not_fit_is_refused(change):
    state = quantized().state_dict()
    if change == "missing":
        del state["down.packed"]
        part = "without {'down.packed'}, with set()"
    elif change == "unexpected":
        state["bias"] = torch.zeros(1)
        part = "without set(), with {'bias'}"
    else:
        state["metadata"] = state["metadata"] | {"format": "int3"}
        part = "'format': 'int3'"
    with pytest.raises(ShapeError) as error:
        ExpertWeights.from_state_dict(state)
    assert part in str(error.value)
    assert quantized().state_dict()["metadata"]["format"] == "nvfp4"


def test_unknown_names():
    for kwargs, message in (
        (
            {"activation": "tanh"},
            f"{Q}activation must be one of {', '.join((*ACTIVATIONS, *PAIRED))}; got 'tanh'. "
            "Pass one of these names.",
        ),
        (
            {"method": "min"},
            "ExpertWeights.quantize: method must be one of max, mse; got 'min'. Pass one of these.",
        ),
    ):
        with pytest.raises(UnsupportedError) as error:
            quantized(**kwargs)
        assert str(error.value) == message
    with pytest.raises(UnsupportedError, match=r"^ExpertWeights: activation must be one of"):
        dataclasses.replace(quantized(), activation="tanh")
