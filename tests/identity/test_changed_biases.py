"""Biases are watched as weights are: the next call uses what they hold then."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from identity_models import ways
from tiny_models import Block, CapturingBackend, experts_class, routed, table_entries

import fp4moe
from fp4moe.experts import ExpertWeights
from fp4moe.identity.float_weights import FloatWeights, StoredForm
from fp4moe.identity.table import find_packed
from fp4moe.reference import moe_definition

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Float32 sums of up to 64 terms in another order, sqrt(64) * 2^-24 each, twice, ten-fold.
LIMIT = 1e-5


def expected(block):
    own = block.experts
    weights = {"gate_up": own.gate_up_proj, "down": own.down_proj}
    held = ExpertWeights.quantize(**weights, activation="silu").dequantize()
    gate, up = own.gate_up_proj_bias.chunk(2, 1)
    biases = {"gate_bias": gate, "up_bias": up, "down_bias": own.down_proj_bias}
    return moe_definition(*routed(5), **held, **biases, activation="silu")


def check(actual, wanted):
    assert (actual - wanted).norm() / wanted.norm() < LIMIT


def run(model):
    with torch.no_grad():
        return model(*routed(5))


def in_place(bias):
    bias.add_(1)


def through_data(bias):
    bias.data += 1


def one_expert_through_data(bias):
    bias.data[5] += 1


def other_data(bias):
    bias.data = bias.data + 1


def through_numpy(bias):
    bias.numpy()[...] *= -1


CHANGES = [in_place, through_data, one_expert_through_data, other_data, through_numpy]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["eager", "pass"])
def test_the_next_call_uses_them(way, change, name):
    block = Block(experts_class(has_bias=True))
    compiled = torch.compile(block, **ways(way))
    check(run(compiled), expected(block))
    change(getattr(block.experts, name))
    for _ in range(2):
        check(run(compiled), expected(block))


def test_two_blocks_share_a_graph():
    # Equal weights, other biases.
    blocks = [Block(experts_class(has_bias=True)) for _ in range(2)]
    blocks[1].experts = type(blocks[0].experts)(blocks[0].experts.config).requires_grad_(False)
    blocks[1].load_state_dict(blocks[0].state_dict())
    blocks[1].experts.down_proj_bias.mul_(2)
    inner = CapturingBackend()
    options = {"inner_backend": inner, "on_no_match": "error"}
    for block in (*blocks, *blocks):
        block.compile(backend=fp4moe.backend, options=options)
        check(run(block), expected(block))
    assert len(inner.graphs) == 1


@pytest.mark.slow
def test_released_with_the_weights():
    block = Block(experts_class(has_bias=True))
    wanted = expected(block)
    compiled = torch.compile(block, **ways("eager", release_weights=True, on_no_match="error"))
    for _ in range(2):
        check(run(compiled), wanted)
    assert not any(p.untyped_storage().nbytes() for p in block.experts.parameters())


@pytest.mark.slow
def test_a_replaced_bias_frees_the_packed_weights():
    block = Block(experts_class(has_bias=True))
    compiled = torch.compile(block, **ways("eager"))
    run(compiled)
    (entry,) = table_entries(block.experts.down_proj_bias)
    alive = weakref.ref(entry)
    bias = block.experts.down_proj_bias * 2
    block.experts.down_proj_bias = torch.nn.Parameter(bias, requires_grad=False)
    del entry
    gc.collect()
    assert alive() is None
    check(run(compiled), expected(block))


class TestFactorPerExpert:
    """`output_scale` multiplies an expert's whole output, its bias included."""

    def entry(self):
        own = Block(experts_class(has_bias=True)).experts
        weights = FloatWeights(
            first=(own.gate_up_proj,),
            second=(),
            down=(own.down_proj,),
            first_bias=(own.gate_up_proj_bias,),
            down_bias=(own.down_proj_bias,),
        )
        form = StoredForm("nvfp4", "silu", "gate_up", False, False, "reference", 256)
        return find_packed(weights, form, caller="test"), own, weights

    def test_scales_the_bias_of_down(self):
        entry, own, _weights = self.entry()
        factor = torch.linspace(0.5, 2.0, 8)
        plain, scaled = (entry.operands(f, caller="test") for f in (None, factor))
        assert torch.equal(scaled.down_global_scale, plain.down_global_scale * factor)
        assert torch.equal(scaled.down_bias, own.down_proj_bias * factor[:, None])
        assert torch.equal(scaled.gate_up_bias, plain.gate_up_bias)
        # In the same memory, which a CUDA graph may know.
        factor.mul_(3)
        again = entry.operands(factor, caller="test")
        assert again.down_bias is scaled.down_bias
        assert torch.equal(scaled.down_bias, own.down_proj_bias * factor[:, None])

    def test_follows_a_changed_bias(self):
        entry, own, weights = self.entry()
        factor = torch.linspace(0.5, 2.0, 8)
        scaled = entry.operands(factor, caller="test")
        own.down_proj_bias.add_(1)
        form = entry.form
        assert find_packed(weights, form, caller="test") is entry
        assert entry.operands(factor, caller="test").down_bias is scaled.down_bias
        assert torch.equal(scaled.down_bias, own.down_proj_bias * factor[:, None])
