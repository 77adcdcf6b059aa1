"""Dense Linears that `quantize_checkpoint` quantises beside the experts."""

from __future__ import annotations

import re

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from raw_files import raw
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.tools.cli import main

KINDS = {
    "NVFP4_DEFAULT_CFG": "nvfp4",
    **{kind: form for kind, form in files.MODELOPT.items() if kind != "W4A8_MXFP4_FP8_CFG"},
}
ATTENTION = re.compile(r"\w+\.(.*\.self_attn\.[qkvo]_proj)\.(weight\w*)")


@pytest.fixture(scope="module", params=["gemma4", "qwen3_moe"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with files.sizes():
        makers.save_float(request.param, folder)
    return folder


def attention(directory):
    found = {ATTENTION.fullmatch(k): t for k, t in makers.load_tensors(directory).items()}
    return {(m[1], m[2]): tensor for m, tensor in found.items() if m}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_modelopts(tmp_path, name, kind):
    files.save("modelopt", name, kind, tmp_path / "theirs")
    with files.sizes(**files.of_modelopt(kind)):
        makers.save_float(name, tmp_path / "float")
    fp4moe.quantize_checkpoint(
        tmp_path / "float",
        tmp_path / "ours",
        format=KINDS[kind],
        linears="*.self_attn.*",
        progress=False,
    )
    ours, theirs = attention(tmp_path / "ours"), attention(tmp_path / "theirs")
    assert set(ours) == set(theirs) and len(ours) >= 16
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert raw(ours[key]) == raw(tensor), key


@pytest.mark.parametrize("form", ["nvfp4", "fp8", "mxfp4"])
def test_what_is_written_is_read(source, tmp_path, form):
    keys = makers.load_tensors(source)
    linears = ["*.self_attn.*", *(["*.mlp.*"] if any(".mlp.up_proj." in k for k in keys) else ())]
    options = {"format": form, "linears": linears, "progress": False}
    report = fp4moe.quantize_checkpoint(source, tmp_path / "out", **options)
    assert f"and {len(report.linears)} Linears" in str(report)
    model = fp4moe.from_pretrained(tmp_path / "out", dtype=torch.float32, progress=False)
    packed = {p for p, m in model.named_modules() if isinstance(m, fp4moe.PackedLinear)}
    # The class may have other words in front.
    assert {n.partition("layers")[2] for n in report.linears} == {
        p.partition("layers")[2] for p in packed
    }
    assert len(packed) >= 8 and not any("gate" in p.split(".") for p in packed)
    expected = makers.logits(makers.reference_model(tmp_path / "out"))
    assert torch.allclose(makers.logits(model), expected, rtol=1e-4, atol=1e-4)
    if form == "nvfp4":
        tensors = makers.load_tensors(tmp_path / "out")
        key = next(k for k in tensors if k.endswith("self_attn.q_proj.weight_scale_2"))
        both = tensors[key], tensors[key.replace("q_proj", "k_proj")]
        assert torch.equal(*both)
        assert not torch.equal(both[0], tensors[key.replace("q_proj", "o_proj")])


@pytest.mark.parametrize("form", ["nvfp4", "fp8_block"])
def test_a_replaced_model_is_saved_the_same(source, tmp_path, form):
    options = {"format": form, "linears": "*.self_attn.*", "progress": False}
    fp4moe.quantize_checkpoint(source, tmp_path / "out", **options)
    model = fp4moe.replace_moe(AutoModelForCausalLM.from_pretrained(source), **options)
    model.save_pretrained(tmp_path / "saved")
    ours, saved = (makers.load_tensors(tmp_path / name) for name in ("out", "saved"))
    assert set(ours) == set(saved)
    for key, tensor in ours.items():
        assert raw(tensor) == raw(saved[key]), key


def test_the_command_line(source, tmp_path):
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--no-progress"]
    assert main([*arguments, "--linears", "*.self_attn.o_proj", "--format", "fp8"]) == 0
    model = fp4moe.from_pretrained(tmp_path / "out", dtype=torch.float32, progress=False)
    packed = [p for p, m in model.named_modules() if isinstance(m, fp4moe.PackedLinear)]
    assert packed and all(p.endswith("self_attn.o_proj") for p in packed)


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        (["*.nothing"], r"linears = '\*.nothing' cannot be quantised, because no 2-D weight"),
        # Looked up, not multiplied; a pattern passes by the head.
        (["*embed_tokens"], "cannot be quantised, because no 2-D weight"),
        (["*lm_hea?"], "cannot be quantised, because no 2-D weight"),
    ],
)
def test_what_is_refused(source, tmp_path, linears, message):
    with pytest.raises(UnsupportedError, match=f"^quantize_checkpoint: .*{message}"):
        fp4moe.quantize_checkpoint(source, tmp_path / "out", linears=linears, progress=False)
    assert not (tmp_path / "out").exists()


def test_ranges_of_experts_do_not_go_with_linears(source, tmp_path):
    report = fp4moe.quantize_checkpoint(source, tmp_path / "plain", progress=False)
    calibration = {name: (0.01, 0.02) for name in report.layers}
    options = {"calibration": calibration, "linears": "*.self_attn.*", "progress": False}
    with pytest.raises(UnsupportedError, match=r"^quantize_checkpoint: experts with activation"):
        fp4moe.quantize_checkpoint(source, tmp_path / "out", **options)
