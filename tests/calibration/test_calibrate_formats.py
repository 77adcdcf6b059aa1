"""calibrate in formats other than the default: whose scales are stored, and what they express."""

from __future__ import annotations

import logging

import pytest
import torch
from refusals import assert_refused
from torch import nn

import fp4moe
from fp4moe.calibration.calibrate import BlockRanges, scales_from_text
from fp4moe.errors import UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.formats import FORMATS
from fp4moe.testing import float_weights, make_layer, relative_error

DYNAMIC = [name for name, format in FORMATS.items() if format.activation_range is None]
REASON = "compute the scales of activations from each input"


def module(format, **options):
    return fp4moe.FusedExperts(make_layer(4, 64, 48, format=format, biased=True, **options))


def inputs(size=1.0):
    return size * torch.randn(50, 64), torch.randint(0, 4, (50, 2)), torch.rand(50, 2)


def test_fp8_gets_the_scale_that_maps_the_largest_magnitude_to_448():
    experts, (x, ids, routing) = module("fp8"), inputs()
    with fp4moe.calibrate(experts) as report:
        experts(x, ids, routing)
    (block,) = report.blocks
    assert block.format == "fp8"
    hidden, inner = experts.activation_scales()
    assert hidden.item() == pytest.approx(x.abs().max().item() / 448, rel=1e-6)
    assert inner.tolist() == pytest.approx([r / 448 for r in block.intermediate_ranges], rel=1e-6)
    assert block.scales("fp8") == (block.hidden_scale, block.intermediate_scale)
    # The same ranges for another format.
    assert block.scales("nvfp4")[0] == pytest.approx(block.hidden_scale / 6)


def test_calibration_lowers_the_error_of_fp8():
    torch.manual_seed(0)
    experts, (x, ids, routing) = module("fp8"), inputs(2000.0)
    weights = experts.weights
    exact = fp4moe.fused_moe(x, weights, ids, routing, kernel="reference")

    def error():
        now = experts.weights
        return relative_error(
            fp4moe.fused_moe(x, now, ids, routing, kernel="reference_w4a4"), exact
        )

    before = error()
    with fp4moe.calibrate(experts):
        experts(x, ids, routing)
    # Two roundings of at most 3.6 % each, see tests/test_expert_formats.py; uncalibrated, 448 is
    # the largest input.
    assert error() < 0.036 * 3**0.5 < before


@pytest.mark.parametrize("format", DYNAMIC)
def test_formats_without_such_scales_say_so(format, caplog):
    experts, (x, ids, routing) = module(format), inputs()
    with pytest.raises(UnsupportedError, match=rf"experts in {format} need none, .*{REASON}"):
        with fp4moe.calibrate(experts):
            experts(x, ids, routing)
    both = nn.ModuleDict({"stored": module("fp8"), "dynamic": experts})
    with caplog.at_level(logging.WARNING, "fp4moe"), fp4moe.calibrate(both) as report:
        both["stored"](x, ids, routing)
    assert [block.path for block in report.blocks] == ["stored"]
    assert f"not calibrated: dynamic: experts in {format} need none" in caplog.text
    for scale in experts.activation_scales():
        assert (scale == 1).all()


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_scale_that_would_go_unread_is_refused(format):
    experts = module(format)
    experts.set_activation_scales(1.0, torch.ones(4))
    assert_refused(
        lambda: experts.set_activation_scales(0.5, 1.0),
        f"FusedExperts.set_activation_scales: hidden_scale = 0.5 has no use, because kernels of "
        f"{format} {REASON}. Leave it out.",
        UnsupportedError,
    )
    assert_refused(
        lambda: ExpertWeights.quantize(
            **float_weights(2, 64, 48),
            activation="silu",
            format=format,
            intermediate_scale=2.0,
        ),
        f"ExpertWeights.quantize: intermediate_scale = 2.0 has no use, because kernels of {format} "
        f"{REASON}. Leave it out.",
        UnsupportedError,
    )
    refusal = f"format {format} needs no calibration, because its kernels {REASON}. Leave it out."
    block = BlockRanges("a", (1,), 1.0, (1.0,))
    assert_refused(lambda: block.scales(format), f"BlockRanges.scales: {refusal}", UnsupportedError)
    assert_refused(
        lambda: scales_from_text("nowhere", "nothing", format=format),
        f"quantize: {refusal}",
        UnsupportedError,
    )


def test_the_advice_names_the_range_of_the_format():
    with pytest.raises(ValueError, match=r"hidden_scale must be positive .* Pass amax / 448, or"):
        module("fp8", hidden_scale=-1.0)
