"""from_pretrained(format=...): a float checkpoint is quantised while it is read, in any format."""

from __future__ import annotations

import checkpoint_makers as makers
import pytest
import torch
from format_models import IDS, logits
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.formats import FORMATS


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
