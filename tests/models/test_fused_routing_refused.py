"""replace_moe(routing="fused") where a router is not one that is known: a reason and no change."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from fused_routers import build, fused_routers, replaced, routers
from loop_models import Model as LoopModel
from loop_models import PlainSigmoid
from tiny_models import fingerprint
from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from fp4moe.errors import UnsupportedError

# What makes the last block impossible, and what is said about it.


class OtherRouter(Qwen3MoeTopKRouter):
    """The right numbers under a name that nobody knows."""


def renamed(name, base, forward):
    """A subclass that computes something else under the name of its base."""
    return type(name, (base,), {"forward": forward})


def flatter(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights * 0.99, ids


def smallest(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, -hidden)
    return -first, weights, ids


def more(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights[:, :1], ids[:, :1]


def masked_with_zero(self, hidden):
    first = nn.functional.linear(hidden.view(-1, 64).float(), self.weight.float())
    scores = first.sigmoid()
    choice = scores + self.e_score_correction_bias
    kept = choice.view(-1, 4, 2).sum(-1).topk(2).indices
    mask = torch.zeros(len(first), 4).scatter(1, kept, 1).repeat_interleave(2, 1)
    ids = (choice * mask).topk(2).indices
    weights = scores.gather(1, ids)
    return first, 2.5 * weights / weights.sum(-1, keepdim=True), ids


def with_router(**settings):
    def change(model, block):
        for name, value in settings.items():
            setattr(block.gate, name, value)

    return change


def router_forward(model, block):
    block.gate.forward = block.gate.forward


def router_on_meta(model, block):
    block.gate.to("meta")


def router_zero(model, block):
    block.gate.weight.data.zero_()


def router_nan(model, block):
    block.gate.weight.data.fill_(torch.nan)


def router_of_nine(model, block):
    block.gate.weight = nn.Parameter(torch.randn(9, 64))


def router_elsewhere(model, block):
    model.far = block.gate
    del block.gate
    block.__dict__["gate"] = model.far


def two_routers(model, block):
    block.second_gate = copy.deepcopy(block.gate)


def without_top_k(model, block):
    del block.gate.top_k


def other_dtype(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights.double(), ids


def probabilities(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first.softmax(-1), weights, ids


REFUSED = {
    "unknown class": (
        with_router(__class__=OtherRouter),
        "gate (OtherRouter) beside it is no router of a class in fp4moe.models.routers.ROUTERS",
    ),
    "not renormalised": (
        with_router(norm_topk_prob=False),
        "its router Qwen3MoeTopKRouter has norm_topk_prob=False, and the operator renormalises",
    ),
    "other weights": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, flatter)),
        "its router Qwen3MoeTopKRouter does not weight as softmax_topk: ",
    ),
    "other experts": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, smallest)),
        "its router Qwen3MoeTopKRouter does not choose as softmax_topk: experts ",
    ),
    "other shape": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, more)),
        "its router Qwen3MoeTopKRouter returns ids of torch.int64 [64, 1], not torch.int64 [64, 2]",
    ),
    "other count": (router_of_nine, "Qwen3MoeTopKRouter has logits of 9 experts, not 8"),
    "other attributes": (
        without_top_k,
        "its router Qwen3MoeTopKRouter is not of the known form: ",
    ),
    "other dtype": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, other_dtype)),
        "returns weights of torch.float64 [64, 2], not torch.float32 [64, 2]",
    ),
    "other logits": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, probabilities)),
        "does not return its logits, or their softmax, as others of its class",
    ),
    "forward": (
        router_forward,
        "the forward of its router Qwen3MoeTopKRouter was replaced on the instance",
    ),
    "meta": (router_on_meta, "in its router Qwen3MoeTopKRouter: weight is on the meta device"),
    "zero": (router_zero, "scores experts alike for all but 0 of 64 random tokens in torch.float"),
    "NaN": (router_nan, "scores experts alike for all but 0 of 64 random tokens in torch.float32"),
    "elsewhere": (router_elsewhere, "its parent Qwen3MoeSparseMoeBlock holds no router beside it"),
    "two routers": (two_routers, "its parent has several routers: gate, second_gate"),
}
LAST = "model.layers.1.mlp.experts"


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_cannot_route_in_the_kernel_is_refused(case, caplog):
    change, reason = REFUSED[case]
    model = build("qwen3_moe")
    change(model, model.model.layers[1].mlp)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        replaced(model)
    text = str(raised.value)
    assert re.match(r"replace_moe: 1 of \d+ blocks cannot be replaced, because ", text)
    assert f"{LAST}: " in text and reason in text
    assert "model.layers.0" not in text
    assert fingerprint(model) == before
    with caplog.at_level(logging.WARNING, "fp4moe"):
        replaced(model, strict=False)
    assert reason in caplog.text
    assert len(fused_routers(model.model.layers[0])) == 1
    assert type(model.get_submodule(LAST)).__name__ == "Qwen3MoeExperts"


def test_experts_of_dropped_groups_with_score_zero_are_not_those_of_the_kernel():
    model = build("nemotron_h_groups")
    router = next(iter(routers(model).values()))
    # With positive scores both agree: only the probe of negative ones can tell.
    router.e_score_correction_bias.zero_()
    assert replaced(copy.deepcopy(model))
    router.__class__ = renamed("NemotronHTopkRouter", NemotronHTopkRouter, masked_with_zero)
    with pytest.raises(UnsupportedError, match="does not choose as sigmoid_topk: experts "):
        replaced(model)


def test_a_loop_over_experts_is_refused():
    model = LoopModel(PlainSigmoid)
    before = fingerprint(model)
    text = "its block loops over a ModuleList and routes by itself; use routing='given'"
    with pytest.raises(UnsupportedError, match=text):
        replaced(model)
    assert fingerprint(model) == before
