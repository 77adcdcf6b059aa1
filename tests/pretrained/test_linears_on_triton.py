"""Quantised Linears of loaded checkpoints on kernel triton: in its interpreter, and on a GPU.

The interpreter's cases are started by tests/kernels/triton/test_triton.py.
"""

from __future__ import annotations

import checkpoint_makers as makers
import pytest
import torch
from triton_layers import interpreted

import fp4moe
import fp4moe.linear
from fp4moe.formats.base import as_bytes
from fp4moe.testing import relative_error

MODELS = ("qwen3_moe", "nemotron_h")


def linears(model):
    return [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]


def load(directory, dtype, **options):
    return fp4moe.from_pretrained(directory, dtype=dtype, progress=False, **options)


@interpreted
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_on_the_interpreter(tmp_path, name, monkeypatch):
    makers.save_modelopt(name, tmp_path)
    plain = load(tmp_path, torch.float32)
    expected, state = makers.logits(plain), plain.state_dict()
    # What a GPU would choose; the experts stay on the reference.
    monkeypatch.setattr(fp4moe.linear, "select_linear_kernel", lambda *args, **keywords: "triton")
    model = load(tmp_path, torch.float32)
    assert len(linears(model)) >= 4 and {m.kernel for m in linears(model)} == {"triton"}
    # float32 sums of the same products; each weight is rounded once more, a few layers deep.
    assert relative_error(makers.logits(model), expected) < 1e-5
    for key, tensor in model.state_dict().items():
        assert torch.equal(as_bytes(tensor), as_bytes(state[key])), key
    half = load(tmp_path, torch.float16)
    # Two roundings a Linear to 2^-11, fewer than 16 of them one behind the other.
    assert relative_error(makers.logits(half).float(), expected) < 32 * 2.0**-11


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_on_the_gpu(tmp_path, name):
    makers.save_modelopt(name, tmp_path)
    expected = makers.logits(load(tmp_path, torch.float32, device_map="cpu"))
    model = load(tmp_path, torch.bfloat16, device_map="cuda")
    assert {m.kernel for m in linears(model)} == {"triton"}
    ids = torch.arange(1, 8, device="cuda")[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    back = model.cpu()
    assert {m.kernel for m in linears(back)} == {"reference"}
    # Two roundings a Linear or experts to 2^-8, fewer than 16 of them one behind the other.
    assert relative_error(makers.logits(back), expected) < 32 * 2.0**-8
    tokens = load(tmp_path, torch.bfloat16, device_map="cuda").generate(ids, max_new_tokens=4)
    assert tokens.shape == (1, 11)
