"""FlashInfer's `mm_fp4` with backend cutlass on a CPU, for tests: call rules and numbers.

Written from gemm_base.py and fp4_gemm_cutlass.cu of FlashInfer 0.6.13 and 0.7.2: scales are read by
byte addresses. What the library checks in Python is asked of the installed library itself; what its
kernel takes for granted (strides, whole tiles of scales) is checked here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from flashinfer_cutlass_emulator import GRID, scale_address


def check_mm_fp4_call(function: Callable, args: tuple, call: dict[str, Any]) -> None:
    """Raise AssertionError, or what the library raises, unless it would compute what is meant."""
    assert not args, "arguments must be named"
    bound = inspect.signature(function).bind(**call)
    bound.apply_defaults()
    importlib.import_module("flashinfer.gemm.gemm_base")._check_mm_fp4_problem_size(
        **bound.arguments
    )
    a, b = call["a"], call["b"]
    k, n = 2 * a.shape[1], b.shape[1]
    assert k % 32 == 0 and n % 32 == 0, f"k and n must be multiples of 32; got {k} and {n}"
    assert a.is_contiguous() and b.T.is_contiguous(), "a must be row-major, b column-major"
    for name, scale, rows in (("a", call["a_descale"], len(a)), ("b", call["b_descale"].T, n)):
        size = -(-rows // 128) * 128 * (-(-k // 64) * 4)
        assert scale.is_contiguous() and scale.numel() == size, (
            f"{name}_descale must be whole tiles"
        )
        assert scale.dtype == torch.uint8
    assert call["backend"] == "cutlass" and call["use_nvfp4"] and not call["use_8x4_sf_layout"]
    assert call["alpha"].numel() == 1, "without alpha the global scales are lost"


def emulate_mm_fp4(**call: Any) -> torch.Tensor:
    """Return (a b) alpha [m, n] of out_dtype, summed in float32."""
    a = _decode(call["a"], call["a_descale"])
    b = _decode(call["b"].T, call["b_descale"].T)
    return (a @ b.T * call["alpha"].reshape(())).to(call["out_dtype"])


def _decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*GRID, *(-value for value in GRID)])
    codes = torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)
    rows, columns = len(codes), codes.shape[1] // 16
    where = scale_address(torch.arange(rows)[:, None], torch.arange(columns), -(-columns // 4) * 4)
    values = scale.contiguous().flatten()[where].view(torch.float8_e4m3fn).float()
    return codes * values.repeat_interleave(16, 1)
