"""Writing checkpoints of every format: bytes and configurations of ModelOpt's own exports."""

from __future__ import annotations

import json
import re

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from raw_files import raw

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.testing import relative_error
from fp4moe.tools.cli import main

KINDS = {kind: form for kind, form in files.MODELOPT.items() if kind != "W4A8_MXFP4_FP8_CFG"}
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)\.\w+")


@pytest.fixture(scope="module", params=["gemma4", "qwen3_moe", "nemotron_h"])
def float_model(request, tmp_path_factory):
    """A name and what transformers saves, in the sizes of format_files."""
    folder = tmp_path_factory.mktemp(request.param)
    with files.sizes():
        makers.save_float(request.param, folder)
    return request.param, folder


def ranges(exported):
    """The calibration that an export holds, one number per layer and GEMM; None without."""
    found = {}
    for key, tensor in exported.items():
        if key.endswith(".input_scale") and (match := EXPERT.fullmatch(key)):
            found.setdefault(match[1], {})[match[2] == "down_proj"] = tensor.item()
    return {name: (both[False], both[True]) for name, both in found.items()} or None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("kind", KINDS)
def test_modelopt_writes_the_same_bytes(tmp_path, name, kind):
    files.save("modelopt", name, kind, tmp_path / "theirs")
    with files.sizes(**files.of_modelopt(kind)):
        makers.save_float(name, tmp_path / "float")
    theirs = makers.load_tensors(tmp_path / "theirs")
    fp4moe.quantize_checkpoint(
        tmp_path / "float",
        tmp_path / "ours",
        format=KINDS[kind],
        calibration=ranges(theirs),
        progress=False,
    )
    # ModelOpt leaves NemotronH's own names, or those of the class, after the one word in front.
    ours, wanted = (
        {key.partition(".")[2]: tensor for key, tensor in found.items() if EXPERT.fullmatch(key)}
        for found in (makers.load_tensors(tmp_path / "ours"), theirs)
    )
    assert set(ours) == set(wanted) != set()
    for key, tensor in wanted.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert raw(ours[key]) == raw(tensor), key
    for file, path in (("hf_quant_config.json", ()), ("config.json", ("quantization_config",))):
        found = [json.loads((tmp_path / d / file).read_text()) for d in ("ours", "theirs")]
        for step in path:
            found = [content[step] for content in found]
        plain = [_without_names(content) for content in found]
        assert plain[0] == plain[1]


def _without_names(content):
    """A configuration without the modules that are left alone: here all but experts are."""
    content = json.loads(json.dumps(content))
    for inner in (content, content.get("quantization", {})):
        inner.pop("exclude_modules", None)
        inner.pop("ignore", None)
    del content["producer"]["version"]
    content["producer"].pop("written_by", None)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read(float_model, tmp_path, form):
    _, source = float_model
    report = fp4moe.quantize_checkpoint(source, tmp_path / "out", format=form, progress=False)
    assert report.format == form and f"are {form.upper()}" in str(report)
    model = fp4moe.from_pretrained(tmp_path / "out", dtype=torch.float32, progress=False)
    found = [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert [m.layer.format for m in found] == [form] * len(report.layers) != []
    assert (
        relative_error(
            makers.logits(model), makers.logits(makers.reference_model(tmp_path / "out"))
        )
        < 1e-6
    )
    plain = fp4moe.from_pretrained(source, dtype=torch.float32, progress=False, kernel="reference")
    # The same experts as replace_moe makes of the float weights, in the dtype of the file.
    float_model = type(plain).from_pretrained(source, dtype=torch.bfloat16)
    fp4moe.replace_moe(float_model, format=form, progress=False)
    made = [m for m in float_model.modules() if isinstance(m, fp4moe.FusedExperts)]
    for ours, theirs in zip(found, made, strict=True):
        for key, tensor in ours.weights.tensors().items():
            assert raw(tensor) == raw(theirs.weights.tensors()[key]), key


def test_the_command_line_takes_a_format(float_model, tmp_path, capsys):
    _, source = float_model
    assert main(["quantize", str(source), str(tmp_path / "out"), "--format", "fp8_block"]) == 0
    assert "are FP8_BLOCK" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "fp8_pb_wo"
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "no"), "--format", "fp7"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "fp7"}, UnsupportedError, "format must be one of nvfp4, fp8, .*; got 'fp7'"),
        ({"format": "mxfp8", "method": "mse"}, UnsupportedError, "method 'mse', because"),
        (
            {"format": "fp8_block", "calibration": {"a": (1.0, 1.0)}},
            UnsupportedError,
            "activation ranges cannot be written for format fp8_block, because",
        ),
        ({"format": "fp8", "calibration": {}}, ShapeError, "calibration must have one entry"),
    ],
)
def test_what_does_not_go_together_is_refused(float_model, tmp_path, options, error, message):
    _, source = float_model
    with pytest.raises(error, match=message):
        fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_columns_that_are_no_blocks_are_refused(tmp_path, name, form):
    makers.save_float(name, tmp_path / "float")
    with pytest.raises(UnsupportedError, match=r"no multiples of 32 in .*down_proj"):
        fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "out", format=form)


def test_a_run_of_another_format_is_not_continued(float_model, tmp_path):
    _, source = float_model
    fp4moe.quantize_checkpoint(source, tmp_path / "out", format="fp8_block", progress=False)
    with pytest.raises(fp4moe.errors.CheckpointError, match="must not exist yet"):
        fp4moe.quantize_checkpoint(source, tmp_path / "out", format="mxfp8", progress=False)
