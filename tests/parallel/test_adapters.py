"""An adapter would see a part of a Linear that processes share, and miss what they exchange."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.part import ROWS, Part

peft = pytest.importorskip("peft", reason="optional package")


@pytest.mark.parametrize("split", [False, True])
def test_adapters_of_split_linears_are_refused(split, registered_peft):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    values = fp4moe.quantize_nvfp4(torch.randn(32, 32))
    model[0] = fp4moe.NVFP4Linear(values.packed, values.block_scale, values.global_scale)
    if split:
        model[0].parts = (Part(ROWS, 1, 2, 32, 64, 64),)
    config = peft.LoraConfig(target_modules=["0"])
    if not split:
        assert peft.get_peft_model(model, config)(torch.randn(2, 32)).shape == (2, 4)
        return
    with pytest.raises(UnsupportedError, match=r"it holds output rows 32 to 63 of 64 \(part 2"):
        peft.get_peft_model(model, config)
