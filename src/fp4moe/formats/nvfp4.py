"""NVFP4 quantise, dequantise, pack and unpack in plain torch, streamed through a fixed scratch.

Bit-exact with ModelOpt's NVFP4QTensor, whose order of float32 operations this follows: E2M1 ties to
even, E4M3 block scales in [2^-9, 448], a block of zeros gets scale 1, low nibble = even element.
One departure: an all-zero tensor gets global scale 1, not 0. Not here: padding, kernel layouts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import torch

from ..errors import UnsupportedError, must
from .base import METHODS, BlockScaledFormat, Part, StoredMatrix, divide
from .four_bits import e2m1_values, unpack_codes
from .nvfp4_rounding import round_activation, round_intermediate

__all__ = [
    "NVFP4",
    "NVFP4Values",
    "dequantize_nvfp4",
    "nvfp4_global_scale",
    "quantize_nvfp4",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Scales are computed by the piece, codes by the chunk; a CPU's chunk stays near its L2 cache.
PIECE_BLOCKS = 1 << 17
CHUNK_BLOCKS = {"cpu": 1 << 14, "other": 1 << 17}

# e4m3 codes that "mse" tries around the one of "max". Three codes down clip a third of the range,
# six up map the largest magnitude to 4 or 3: test_quantize.py compares with all 126 codes.
MSE_WINDOW = (-1, 1, -2, 2, -3, 3, 4, 5, 6)

# Added to a float32 below 2^22, this rounds it to an integer, ties to even, left in the low bits.
ROUND, ROUND_BITS = 1.5 * 2.0**23, 0x4B400000


@dataclasses.dataclass(frozen=True)
class NVFP4Values(StoredMatrix):
    """An NVFP4 tensor.

    Attributes:
        packed: [..., K / 2] uint8, two codes a byte, low nibble = even element.
        block_scale: [..., K / 16] float8_e4m3fn, linear order.
        global_scale: float32 decode multiplier, 0-d or one per leading index.
    """


@dataclasses.dataclass(frozen=True)
class _NVFP4(BlockScaledFormat):
    container = NVFP4Values

    def shared_scale(self, extremes: torch.Tensor) -> torch.Tensor:
        return nvfp4_global_scale(extremes)

    def quantize(
        self, weight: torch.Tensor, shared_scale: torch.Tensor, method: str
    ) -> StoredMatrix:
        return quantize_nvfp4(weight, shared_scale, method)

    def dequantize(self, stored: StoredMatrix, dtype: torch.dtype, halves: int = 1) -> torch.Tensor:
        return dequantize_nvfp4(stored, dtype)

    def round_activation(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_activation(self, x, scale)

    def round_intermediate(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_intermediate(self, x, scale)


# E2M1 elements, E4M3 block scales (subnormal minimum 2^-9), one float32 global scale per tensor.
NVFP4 = _NVFP4(
    name="nvfp4",
    codes=Part(torch.uint8, 2),
    scales=Part(torch.float8_e4m3fn, 16),
    globally_scaled=True,
    multiple=16,
    methods=METHODS,
    activation_bits=4,
    grid=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    element_bits=4,
    block_size=16,
    scale_dtype=torch.float8_e4m3fn,
    scale_min=2.0**-9,
    scale_max=448.0,
)


def quantize_nvfp4(
    x: torch.Tensor, global_scale: float | torch.Tensor | None = None, method: str = "max"
) -> NVFP4Values:
    """Quantise `x` along its last axis.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64 (cast to float32), K a multiple of 16;
            any strides, any device.
        global_scale: decode multiplier; a number, 0-d, or shaped like leading axes of `x`, such
            as [E] for [E, N, K]. None: `nvfp4_global_scale(x)`, one for the whole tensor.
        method: "max" maps each block's largest magnitude to 6, as ModelOpt does; "mse" searches
            nearby block scales for the least squared error, never above that of "max".

    Returns:
        Codes, block scales and the float32 global scale, on the device of `x`.

    Raises:
        ShapeError: a shape, dtype or value does not fit, such as inf or NaN in `x`.
        UnsupportedError: no such method.
    """
    name = "quantize_nvfp4"
    if method not in METHODS:
        known = ", ".join(METHODS)
        advice = "Choose one of these."
        must(f"{name}: method", f"be one of {known}", repr(method), advice, error=UnsupportedError)
    _check_float(name, x)
    if x.ndim == 0 or x.shape[-1] % NVFP4.block_size:
        rule = f"have a last axis that is a multiple of {NVFP4.block_size}"
        must(f"{name}: x", rule, f"shape {tuple(x.shape)}", "Pad the last axis with zeros.")
    x = x.detach()
    if global_scale is None:
        g = _scale_of(_amax(name, x))
    else:
        g = _checked_scale(name, global_scale, x)
    lead = x.shape[:-1]
    packed = x.new_empty((*lead, NVFP4.packed_columns(x.shape[-1])), dtype=torch.uint8)
    scale = x.new_empty((*lead, NVFP4.scale_columns(x.shape[-1])), dtype=NVFP4.scale_dtype)
    if not x.numel():
        return NVFP4Values(packed, scale, g)
    blocks, g_blocks = x.unflatten(-1, (-1, NVFP4.block_size)), _expand(g, scale.shape)
    packed_flat, scale_flat = packed.view(-1, 8), scale.view(-1)
    scratch = _Scratch(x.device, scale.numel())
    start, peaks = 0, []
    for where in _pieces(scale.shape, PIECE_BLOCKS):
        piece, g_piece = _contiguous(blocks[where]), g_blocks[where].reshape(-1)
        end = start + len(piece)
        parts = [slice(i, i + scratch.blocks) for i in range(0, len(piece), scratch.blocks)]
        amax = torch.cat([_block_amax(piece[part], scratch) for part in parts])
        peaks.append(amax.amax())
        s = amax.div_(NVFP4.element_max * g_piece)
        s.add_(torch.eq(s, 0, out=torch.empty_like(s)))  # 0 -> 1; a bool mask would be slower
        s = s.clamp_(NVFP4.scale_min, NVFP4.scale_max).to(NVFP4.scale_dtype)
        if method == "mse":
            s = torch.cat([_search_scales(piece[part], s[part], g_piece[part]) for part in parts])
        scale_flat[start:end] = s
        step = s.float() * g_piece
        for part in parts:
            _encode(piece[part], step[part], packed_flat[start:end][part], scratch)
        start = end
    if global_scale is not None:
        _check_finite(name, torch.stack(peaks).amax())
    return NVFP4Values(packed, scale, g)


def dequantize_nvfp4(q: StoredMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode `q`: e2m1 x (block_scale x global_scale) in float32, then one cast.

    Args:
        q: packed [..., K / 2], block_scale [..., K / 16], global_scale 0-d or of leading axes.
        dtype: floating dtype of the result.

    Returns:
        [..., K] of `dtype`. Code 8 (minus zero) decodes to +0, as in ModelOpt.

    Raises:
        ShapeError: the parts of `q` do not belong together, or `dtype` is not a floating one.
    """
    name, packed, scale = "dequantize_nvfp4", q.packed, q.block_scale
    if not dtype.is_floating_point:
        must(f"{name}: dtype", "be a floating dtype", dtype, "Use torch.float32 or torch.bfloat16.")
    got = f"{packed.dtype} {tuple(packed.shape)} and {tuple(scale.shape)}"
    columns = scale.shape[-1] if scale.ndim else 0
    if packed.dtype != torch.uint8 or packed.shape != (*scale.shape[:-1], columns * 8):
        rule = "hold uint8 packed [..., K / 2] and block_scale [..., K / 16]"
        must(f"{name}: q", rule, got, "Rebuild q with quantize_nvfp4.")
    g = q.global_scale.to(packed.device, torch.float32)
    if g.shape != scale.shape[:-1][: g.ndim]:
        rule = "hold a global_scale that is 0-d or has the shape of leading axes of packed"
        must(f"{name}: q", rule, f"{tuple(g.shape)} for {tuple(packed.shape)}", "Reshape it.")
    out = packed.new_empty((*packed.shape[:-1], columns * NVFP4.block_size), dtype=dtype)
    if not out.numel():
        return out
    flat, blocks = out.view(-1, 16), packed.unflatten(-1, (-1, 8))
    g_blocks = _expand(g, scale.shape)
    size = min(_chunk_blocks(packed.device), scale.numel())
    # A byte is looked up as two bfloat16 in one int32: every E2M1 value is exact in bfloat16.
    grid = e2m1_values(packed.device)
    both = unpack_codes(torch.arange(256, dtype=torch.uint8, device=packed.device)).int()
    table = torch.cat((grid, 0 - grid))[both].bfloat16().view(torch.int32)
    index, pairs = torch.empty(2, size * 8, dtype=torch.int32, device=packed.device)
    values, start = torch.empty(size, 16, dtype=torch.float32, device=packed.device), 0
    for where in _pieces(scale.shape, size):
        step = (scale[where].float() * g_blocks[where]).reshape(-1, 1)
        n = len(step)
        index[: n * 8].view(blocks[where].shape).copy_(blocks[where])
        torch.index_select(table, 0, index[: n * 8], out=pairs[: n * 8])
        values[:n].copy_(pairs[: n * 8].view(torch.bfloat16).view(n, 16))
        if dtype == torch.float32:
            torch.mul(values[:n], step, out=flat[start : start + n])
        else:
            flat[start : start + n].copy_(values[:n].mul_(step))
        start += n
    return out


def nvfp4_global_scale(x: torch.Tensor, dim: int | Sequence[int] | None = None) -> torch.Tensor:
    """The global scale (decode multiplier) of `x`: amax / (6 x 448) in float32, as ModelOpt's.

    All zeros give 1.0; a quotient that underflows gives 2^-149, the smallest subnormal.

    Args:
        x: floating tensor of any shape.
        dim: axis or axes to reduce; None for all. (1, 2) gives one per expert of [E, N, K].

    Returns:
        float32; the shape of `x` without `dim`, 0-d for None.

    Raises:
        ShapeError: `x` is not floating or holds inf or NaN.
    """
    name = "nvfp4_global_scale"
    _check_float(name, x)
    x = x.detach()
    if dim is None:
        return _scale_of(_amax(name, x))
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if not x.numel():
        return torch.ones_like(x.sum(axes), dtype=torch.float32)
    amax = torch.maximum(x.amax(axes), x.amin(axes).neg()).float()
    _check_finite(name, amax.amax())
    return _scale_of(amax)


class _Scratch:
    """The buffers that encode one chunk, allocated once per call."""

    def __init__(self, device: torch.device, blocks: int) -> None:
        self.blocks = min(blocks, _chunk_blocks(device))
        count = self.blocks * NVFP4.block_size
        self.floats = torch.empty(4, count, dtype=torch.float32, device=device)
        self.codes = torch.empty(count, dtype=torch.uint8, device=device)
        self.odd = torch.empty(count // 2, dtype=torch.int16, device=device)
        self.zero = torch.zeros((), dtype=torch.float32, device=device)
        rounding = [ROUND, ROUND + 2, ROUND + 4]
        self.round = torch.tensor(rounding, dtype=torch.float32, device=device).unbind()


def _encode(x: torch.Tensor, step: torch.Tensor, packed: torch.Tensor, scratch: _Scratch) -> None:
    """Write the codes of x / step, rounded to E2M1; x [B, 16], step [B], packed [B, 8]."""
    count = x.numel()
    a, t, u, negative = scratch.floats[:, :count]
    blocks, code = a.view(x.shape), t.view(torch.int32)
    blocks.copy_(x).div_(step.unsqueeze(-1))
    torch.lt(a, scratch.zero, out=negative)
    a.abs_()
    # min(rint(2a), rint(a) + 2, rint(a / 2) + 4, 7), as integers: NaN ends as 7, as in ModelOpt.
    torch.add(scratch.round[0], a, alpha=2, out=t)
    torch.add(scratch.round[1], a, out=u)
    torch.minimum(code, u.view(torch.int32), out=code)
    torch.add(scratch.round[2], a, alpha=0.5, out=a)
    torch.minimum(code, a.view(torch.int32), out=code)
    code.clamp_(max=ROUND_BITS + 7)
    t.add_(negative, alpha=8)
    word = scratch.codes[:count].copy_(code).view(torch.int16)  # the copy keeps the low byte
    odd = torch.bitwise_right_shift(word, 4, out=scratch.odd[: count // 2])
    packed.view(-1).copy_(word.bitwise_or_(odd))


def _block_amax(blocks: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """[B, 16] contiguous -> [B] float32 largest magnitudes; inf and NaN come through.

    Magnitudes order like their bits, so these are maxima of integers: over 64-bit words, whose
    transposed read is cheap, by lanes, then over the lanes of the word that is left.
    """
    lane, mask = torch.int16, 0x7FFF7FFF7FFF7FFF
    if blocks.dtype == torch.float32:
        lane, mask = torch.int32, 0x7FFFFFFF7FFFFFFF
    words = blocks.view(torch.int64).t()
    magnitudes = scratch.floats[0].view(torch.int64)[: words.numel()].view(words.shape)
    torch.bitwise_and(words, mask, out=magnitudes)
    lanes = magnitudes.view(lane).amax(0).view(len(blocks), -1).unbind(-1)
    return functools.reduce(torch.maximum, lanes).view(blocks.dtype).float()


def _search_scales(x: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The e4m3 scales near s with the least squared error; x [B, 16], s and g [B]."""
    a = torch.empty(x.shape[::-1], dtype=torch.float32, device=x.device).copy_(x.t()).abs_()
    first, step = s.view(torch.uint8).short(), s.float() * g
    norm = step.reciprocal()
    best, best_code = _block_error(a, step, norm), first
    for delta in MSE_WINDOW:
        code = (first + delta).clamp_(1, 126)
        error = _block_error(a, code.byte().view(s.dtype).float() * g, norm)
        # Sums of 16 squares are good to 2^-20: with this margin a win here is one in exact terms.
        better = error < best * (1 - 2.0**-18)
        best, best_code = torch.where(better, error, best), torch.where(better, code, best_code)
    return best_code.byte().view(s.dtype)


def _block_error(a: torch.Tensor, step: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Sums over axis 0 of ((decoded - a) x norm)^2; a [16, B] magnitudes, the others [B]."""
    y = (a / step).clamp_(max=NVFP4.element_max)
    # Adding 2^22 x its power of two (at least 1) and taking it off leaves one mantissa bit.
    power = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(1.0, 4.0)
    y.add_(power, alpha=2.0**22).sub_(power, alpha=2.0**22)
    return y.mul_(step).sub_(a).mul_(norm).square_().sum(0)


def _chunk_blocks(device: torch.device) -> int:
    return CHUNK_BLOCKS["cpu" if device.type == "cpu" else "other"]


def _pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut a tensor of `shape` into runs of at most `limit`, in row-major order."""
    inner = math.prod(shape[1:])
    if not shape or inner == 0:
        yield from () if 0 in shape else ((),)
    elif inner > limit:
        for i in range(shape[0]):
            yield from ((i, *rest) for rest in _pieces(shape[1:], limit))
    else:
        count = -(-shape[0] // (limit // inner))
        rows = -(-shape[0] // max(count, 1))
        yield from ((slice(i, i + rows),) for i in range(0, shape[0], max(rows, 1)))


def _contiguous(piece: torch.Tensor) -> torch.Tensor:
    """A piece as [B, 16] that can be viewed as 64-bit words, copied only where it must be."""
    if piece.dtype == torch.float64:
        piece = piece.float()
    piece = piece.reshape(-1, NVFP4.block_size).contiguous()
    return piece.clone() if piece.storage_offset() * piece.element_size() % 8 else piece


def _expand(g: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return g.reshape(*g.shape, *[1] * (len(shape) - g.ndim)).expand(shape)


def _amax(name: str, x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a tensor as a finite 0-d float32."""
    pieces = _pieces(x.shape, PIECE_BLOCKS * 4 * NVFP4.block_size)
    ends = [torch.stack(torch.aminmax(x[where])) for where in pieces]
    if not ends:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    amax = torch.stack(ends).float().abs().amax()
    _check_finite(name, amax)
    return amax


def _scale_of(amax: torch.Tensor) -> torch.Tensor:
    g = divide(amax, NVFP4.activation_range).clamp_(min=2.0**-149)
    return torch.where(amax == 0, 1.0, g)


def _checked_scale(name: str, value: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    g = torch.as_tensor(value, dtype=torch.float32, device=x.device).detach()
    if g.shape != x.shape[:-1][: g.ndim]:
        rule = "be a number or have the shape of leading axes of x"
        got = f"{tuple(g.shape)} for x {tuple(x.shape)}"
        must(
            f"{name}: global_scale", rule, got, "Pass one scale per leading index, or a 0-d tensor."
        )
    bad = g[~((g > 0) & torch.isfinite(g))]
    if bad.numel():
        rule = "be finite and above 0 in float32"
        fix = "Pass the decode multiplier, amax / (6 x 448), or None."
        must(f"{name}: global_scale", rule, float(bad[0]), fix)
    return g


def _check_float(name: str, x: torch.Tensor) -> None:
    got = getattr(x, "dtype", type(x).__name__)
    if got not in FLOAT_DTYPES:
        rule = "be a float32, bfloat16, float16 or float64 tensor"
        must(f"{name}: x", rule, got, "Cast it first.")


def _check_finite(name: str, amax: torch.Tensor) -> None:
    if not math.isfinite(value := float(amax)):
        fix = "Replace inf and NaN (torch.nan_to_num), or find the layer that made them."
        must(f"{name}: x", "be finite", f"a largest magnitude of {value}", fix)
