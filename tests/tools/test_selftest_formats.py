"""selftest of the formats: a kernel that reads one of them wrongly fails in the row for that."""

from __future__ import annotations

import json

import pytest
import torch
from selftest_kernels import SIZES, TOKENS, DownBiasUnweighted, Variant, failed, run

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.formats.base import as_bytes
from fp4moe.kernels import KERNELS
from fp4moe.tools.cli import main
from fp4moe.tools.selftest import LAYERS, default_layers, run_selftest

OTHERS = [format for format in FORMATS if format != "nvfp4"]
STATIC = [format for format in OTHERS if FORMATS[format].activation_range is not None]
# Two blocks of 128 x 128 in either direction.
SIZES = {**SIZES, "hidden_size": 150, "intermediate_size": 136}
SCALES = ["gate_up_block_scale", "down_block_scale"]


def layers(format, gated=True, activation="silu", **more):
    sizes = {"activation": activation, "gated": gated, "format": format, **SIZES, **more}
    return {"layer": sizes}


def mutated(change):
    kernel = Variant()
    kernel.change = change
    return kernel


def rolled(name, dim):
    def change(operands):
        tensor = getattr(operands, name)
        moved = as_bytes(tensor).roll(1, dim).view(tensor.dtype)
        return operands._replace(**{name: moved})

    return change


def with_scale(name, new):
    return lambda operands: operands._replace(**{name: new(getattr(operands, name))})


def shared(scale):
    return scale[:1].expand_as(scale).clone()


def unread(scale):
    return torch.full_like(scale, 120 if scale.dtype == torch.uint8 else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("format", OTHERS)
def test_the_definition_passes(format, gated, monkeypatch):
    activation = "silu" if gated else "relu2"
    assert run(monkeypatch, Variant(), layers(format, gated, activation)).passed


@pytest.mark.slow
@pytest.mark.parametrize("change", [shared, unread])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", OTHERS)
def test_a_wrong_scale_fails_in_its_row(format, scale, change, monkeypatch):
    kernel = mutated(with_scale(scale, change))
    row = scale.replace("_block", ".block")
    assert {row, "numbers"} <= failed(run(monkeypatch, kernel, layers(format)))


@pytest.mark.parametrize("scale", ["hidden_scale", "intermediate_scale"])
@pytest.mark.parametrize("format", STATIC)
def test_a_wrong_static_scale_fails_in_its_row(format, scale, monkeypatch):
    kernel = mutated(with_scale(scale, torch.ones_like))
    assert scale in failed(run(monkeypatch, kernel, layers(format)))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["gate_up_packed", "down_packed", *SCALES])
@pytest.mark.parametrize("format", OTHERS)
def test_a_wrong_layout_fails(format, name, dim, monkeypatch):
    """A tensor whose experts, rows or columns are moved by one."""
    kernel, of = mutated(rolled(name, dim)), layers(format)
    monkeypatch.setitem(KERNELS, "reference_w4a4", kernel)
    report = run_selftest("reference_w4a4", device="cpu", layers=of, tokens=(33,))
    part = FORMATS[format].scales if name in SCALES else FORMATS[format].codes
    entries = part.shape(5, 2 * 144, 160, 2) if "gate" in name else part.shape(5, 160, 144, 1)
    # Of one entry nothing can be moved: of scales a matrix or a row.
    assert report.passed == (entries[dim] == 1), report


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
def test_biases_of_gpt_oss(format, monkeypatch):
    of = layers(format, activation="silu(alpha=1.702,beta=1,limit=1)", biased=True)
    assert run(monkeypatch, Variant(), of).passed
    for name in ("gate_up_bias", "down_bias"):
        kernel = mutated(with_scale(name, torch.zeros_like))
        assert "numbers" in failed(run(monkeypatch, kernel, of))
    assert "numbers" in failed(run(monkeypatch, DownBiasUnweighted(), of))


@pytest.mark.slow
@pytest.mark.parametrize("format", OTHERS)
def test_activations_that_are_not_rounded_fail(format, monkeypatch):
    """The kernel of 16-bit activations, tested as one that rounds them."""
    monkeypatch.setattr(KERNELS["reference"], "quantizes_activations", True)
    report = run_selftest("reference", device="cpu", layers=layers(format), tokens=TOKENS)
    # The limit of blocks allows for one more rounding, so it cannot tell.
    assert ("numbers" in failed(report)) == (format != "fp8_block")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_layers_have_each_format(device):
    found = default_layers(torch.device(device))
    forms = {(s.get("format", "nvfp4"), s["gated"], s.get("biased", False)) for s in found.values()}
    wanted = {(format, gated, False) for format in FORMATS for gated in (True, False)}
    assert forms == wanted | {(format, True, True) for format in ("nvfp4", "mxfp8", "mxfp4")}
    assert all("limit" in s["activation"] for s in found.values() if s.get("biased"))
    for format in FORMATS:
        some = default_layers(torch.device(device), [format])
        assert some == {n: s for n, s in found.items() if s.get("format", "nvfp4") == format}
    blocks = [s for s in found.values() if s.get("format") == "fp8_block"]
    assert all(min(s["hidden_size"], s["intermediate_size"]) > 128 for s in blocks)
    assert all(s["intermediate_size"] % 128 for s in blocks)
    assert (list(found)[:2] == list(LAYERS)) == (device == "cuda")


def test_the_command_line_takes_formats(capsys):
    arguments = ["selftest", "--device", "cpu", "--tokens", "3", "--format", "fp8", "mxfp4"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["layer"].partition(":")[0] for row in rows} == {"fp8", "mxfp4"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "int4"}, UnsupportedError, "^selftest: format must be one of .* got 'int4'"),
        ({"format": ("fp8", 8)}, UnsupportedError, "^selftest: format must be one of .* got 8"),
        ({"format": ()}, ShapeError, "^selftest: format must name a format; got none"),
        (
            {"format": "fp8", "layers": layers("fp8")},
            ShapeError,
            "^selftest: format must be None where layers are given; got 'fp8'",
        ),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        run_selftest("reference", device="cpu", tokens=(1,), **options)
