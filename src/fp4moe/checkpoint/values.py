"""The tensors of a matrix as a format has them, each value looked at.

A file may store scales as encode multipliers, in other dtypes, or one for many experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .files import CheckpointFiles
from .naming import fail

__all__ = ["CPU", "FIX", "Cut", "fill_unseen", "is_normal", "read_block_scales", "read_codes"]
__all__ += ["read_input_scales", "read_numbers", "spread"]

CPU = torch.device("cpu")
FIX = "Download it again, or quantise the model again"
# What is read of a tensor: a view of it.
Cut = Callable[[torch.Tensor], torch.Tensor]


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def read_codes(
    files: CheckpointFiles, key: str, shape: tuple[int, ...], cut: Cut = _all
) -> torch.Tensor:
    """The codes of a matrix or a stack, mapped into memory; nothing else is read than the cut."""
    codes = cut(files.tensor(key).reshape(shape))
    codes = codes.view(torch.uint8) if codes.dtype == torch.int8 else codes
    if codes.dtype == torch.float8_e4m3fn and _has_nan(codes):
        fail("hold no NaN", f"NaN in {key!r}", FIX)
    return codes


def _has_nan(codes: torch.Tensor) -> bool:
    """Whether any e4m3 code is NaN: all bits but the sign; it has no infinity."""
    flat = codes.reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    # Eight bytes at a time: one more than 0x7F sets the bit of the sign, which was cleared.
    words = flat[:whole].view(torch.int64).bitwise_and(0x7F7F7F7F7F7F7F7F)
    words.add_(0x0101010101010101).bitwise_and_(0x8080808080808080 - (1 << 64))
    return bool(words.any()) or bool(flat[whole:].bitwise_and(0x7F).eq(0x7F).any())


def read_block_scales(
    files: CheckpointFiles,
    key: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    cut: Cut = _all,
) -> torch.Tensor:
    """Block scales as a format has them; float ones may be one for all experts, or one each."""
    if dtype == torch.float32:
        numbers = read_numbers(files, key, False, zero=shape[-2:] != (1, 1))
        if numbers.numel() < math.prod(shape):
            numbers = numbers.reshape(-1, 1, 1).expand(shape)
        return cut(numbers.reshape(shape))
    codes = cut(files.tensor(key).view(torch.uint8).reshape(shape))
    # Powers of two have one NaN, e4m3 two, and a sign.
    bad = codes.ge(0x7F) if dtype == torch.float8_e4m3fn else codes.eq(0xFF)
    if bool(bad.any()):
        fail("hold block scales that are numbers and not negative", f"others in {key!r}", FIX)
    return codes.view(dtype)


def read_numbers(
    files: CheckpointFiles, key: str, invert: bool, zero: bool = False
) -> torch.Tensor:
    """Scales as float32 decode multipliers; zero: whether one may be 0, for a block of zeros."""
    stored = files.tensor(key).to(torch.float32, copy=True)
    value = stored.reciprocal() if invert else stored
    for tensor in (stored, value):
        sound = torch.isfinite(tensor) & ((tensor >= 0) if zero else (tensor > 0))
        if not bool(sound.all()):
            bad = float(stored[~sound][0]) if stored.ndim else float(stored)
            rule = f"hold scales that are finite and {'not negative' if zero else 'above 0'}"
            fail(rule, f"{bad} in {key!r}", FIX)
    return value


def read_input_scales(files: CheckpointFiles, key: str, invert: bool) -> torch.Tensor:
    """Input scales as float32 decode multipliers; 0 where calibration saw no token."""
    stored = files.tensor(key).to(torch.float32, copy=True)
    if bad := stored[~(stored >= 0)].tolist():
        fail("hold input scales that are numbers and not negative", f"{bad[0]} in {key!r}", FIX)
    value = stored.reciprocal() if invert else stored
    return torch.where(torch.isfinite(value), value, 0)


def fill_unseen(scales: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
    """[E] input scales with the largest for whom none is known, and who these are."""
    if bool(scales.isnan().all()):
        return torch.ones_like(scales), set()
    known = scales > 0
    largest = float(scales[known].amax()) if bool(known.any()) else 1.0
    return torch.where(known, scales, largest), set((~known).nonzero().flatten().tolist())


def is_normal(scales: torch.Tensor) -> bool:
    """Whether all are finite and so large that float32 keeps all bits."""
    return bool((torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny)).all())


def spread(scale: torch.Tensor, count: int, half: int | None) -> torch.Tensor:
    """One value, one an expert, or one for gate and one for up of each expert -> [E]."""
    if half is not None and scale.numel() == 2 * count:
        return scale.reshape(count, 2)[:, half].clone()
    return scale.reshape(-1).expand(count).clone()
