"""Weight matrices that try a quantiser, and how to compare bytes."""

from __future__ import annotations

import torch

from fp4moe.formats import StoredMatrix, WeightFormat

__all__ = ["DTYPES", "assert_same_bytes", "quantized", "weight_cases"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_cases(rows: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return finite matrices by name; every dtype casts the same float32 ones."""
    normal = torch.randn(rows, columns)
    peak = normal.abs().max()
    zeros = normal.clone()
    zeros[:, 128:256] = 0
    zeros[:128, : columns // 2] = 0
    zeros[3] = 0
    zeros[0, ::3] = -0.0
    cases = {
        "normal": normal,
        "tiny": normal * 1e-6,
        "denormal16": normal * 1e-39,
        "denormal32": normal * 1e-42,
        "huge32": normal / peak * 3.3e38,
        "huge16": normal / peak * 6.5e4,
        "wide": normal * torch.exp2(torch.randint(-40, 14, normal.shape).float()),
        "rows apart": normal * torch.exp2(torch.randint(-30, 14, (rows, 1)).float()),
        "constant": torch.full_like(normal, -0.3),
        "few bits": (normal * 4).round() / 4,
        "zeros here and there": zeros,
        "all zero": torch.zeros_like(normal),
    }
    cast = {name: x.to(dtype) for name, x in cases.items()}
    return {name: x for name, x in cast.items() if torch.isfinite(x).all()}


def quantized(format: WeightFormat, weight: torch.Tensor) -> StoredMatrix:
    """Quantise one matrix with the scale of its own extremes."""
    ends = torch.stack(torch.aminmax(weight.float()))
    return format.quantize(weight, format.shared_scale(ends), "max")


def assert_same_bytes(ours: torch.Tensor, theirs: torch.Tensor, message: str = "") -> None:
    """Same shape, dtype and bytes, the sign of a zero included."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), message
    same = ours.contiguous().view(torch.uint8) == theirs.contiguous().view(torch.uint8)
    assert same.all(), f"{message}: {int((~same).sum())} of {same.numel()} bytes differ"
