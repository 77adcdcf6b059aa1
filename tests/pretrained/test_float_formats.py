"""from_pretrained(format=...): a float checkpoint is quantised while it is read, in any format."""

from __future__ import annotations

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from format_models import IDS, logits
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.errors import UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.kernels import KERNELS
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.pretrained.placeholder import Placeholder
from fp4moe.reference import reference


@pytest.fixture(scope="module", params=["qwen3_moe", "nemotron_h"])
def directory(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    makers.save_float(request.param, folder)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_what_replace_moe_makes(directory, format):
    wanted = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    fp4moe.replace_moe(wanted, format=format, progress=False)
    model = fp4moe.from_pretrained(directory, dtype=torch.float32, format=format, progress=False)
    assert {block.format for block in fp4moe.explain(model).blocks} == {format}
    state = model.state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for key, tensor in wanted.state_dict().items():
        assert tensor.dtype == state[key].dtype and tensor.shape == state[key].shape, key
        assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8)), key
    assert torch.equal(logits(model, IDS), logits(wanted, IDS))


def test_what_cannot_be_asked_for_is_refused(directory, tmp_path):
    with pytest.raises(UnsupportedError, match=r"^from_pretrained: format must .* got 'int4'"):
        fp4moe.from_pretrained(directory, format="int4")
    fp4moe.quantize_checkpoint(directory, tmp_path / "quantised", progress=False)
    for format in ("fp8", "nvfp4"):
        text = rf"^from_pretrained: the experts of .* cannot be quantised to {format}, because"
        with pytest.raises(UnsupportedError, match=text):
            fp4moe.from_pretrained(tmp_path / "quantised", format=format)


def only(monkeypatch, *formats):
    """Make a CPU's one kernel one of these formats alone."""
    kernel = ReferenceKernel("reference", reference, automatic=True)
    kernel.layouts = {form: kernel.layouts[form] for form in formats}
    monkeypatch.setitem(KERNELS, "reference", kernel)


@pytest.mark.parametrize(("asked", "other"), [("fp8", "nvfp4"), ("nvfp4", "mxfp4")])
def test_a_kernel_is_asked_for_that_format_before_weights_are_read(
    directory, monkeypatch, asked, other
):
    only(monkeypatch, asked)
    model = fp4moe.from_pretrained(directory, kernel="reference", format=asked, progress=False)
    assert {block.format for block in fp4moe.explain(model).blocks} == {asked}
    read = []
    monkeypatch.setattr(CheckpointFiles, "tensor", lambda self, key: read.append(key))
    with pytest.raises(UnsupportedError, match=f"no layout for {other}, only for {asked}"):
        fp4moe.from_pretrained(directory, kernel="reference", format=other, progress=False)
    assert read == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_what_a_device_map_counts_is_what_the_experts_take(
    directory, monkeypatch, tmp_path, format, biased
):
    if biased:
        directory = tmp_path
        files.save_gpt_oss(directory, packed=False)
    counted = []
    plain = Placeholder.__init__
    monkeypatch.setattr(
        Placeholder, "__init__", lambda self, nbytes: counted.append(nbytes) or plain(self, nbytes)
    )
    model = fp4moe.from_pretrained(directory, format=format, progress=False)
    layers = [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    # Scales of activations are not counted: 4 bytes, and 4 more an expert.
    small = [4 + 4 * weights.local_experts for weights in layers]
    taken = [sum(t.nbytes for t in weights.tensors().values()) for weights in layers]
    assert [t - s for t, s in zip(taken, small, strict=True)] == counted
