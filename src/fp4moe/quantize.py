"""NVFP4 quantise, dequantise, pack and unpack in plain torch, streamed through a fixed scratch.

Bit-exact with ModelOpt's NVFP4QTensor, whose order of float32 operations this follows: E2M1 ties to even, E4M3
block scales in [2^-9, 448], a block of zeros gets scale 1, low nibble = even element. It departs in one place:
an all-zero tensor gets global scale 1, not 0. Not handled here: padding, kernel layouts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import torch

from .errors import ShapeError, UnsupportedError
from .formats import NVFP4

__all__ = [
    "NVFP4Values",
    "dequantize_nvfp4",
    "nvfp4_global_scale",
    "pack_codes",
    "quantize_nvfp4",
    "unpack_codes",
]

METHODS = ("max", "mse")

# Input is read in pieces and worked on in chunks; a CPU chunk's four float32 buffers stay near the L2 cache.
PIECE_BLOCKS = 1 << 16
CHUNK_BLOCKS = {"cpu": 1 << 14, "other": 1 << 17}

# e4m3 codes that "mse" tries around the code of "max"; tests/test_quantize.py shows what a wider window would add.
MSE_WINDOW = (-1, 1, -2, 2, -3, 3, 4, 5, 6)

# Added to |v| < 2^22, this float32 rounds v to an integer, ties to even, and leaves it in its own low bits.
ROUND = 1.5 * 2.0**23
ROUND_BITS = 0x4B400000

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class NVFP4Values:
    """An NVFP4 tensor; a plain container, so that an unsupported torch operation fails loudly.

    Attributes:
        packed: [..., K / 2] uint8, two codes a byte, low nibble = even element.
        block_scale: [..., K / 16] float8_e4m3fn, linear order.
        global_scale: float32 decode multiplier, 0-d or one per leading index.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor


def quantize_nvfp4(
    x: torch.Tensor,
    global_scale: float | torch.Tensor | None = None,
    method: str = "max",
) -> NVFP4Values:
    """Quantise `x` along its last axis.

    Args:
        x: [..., K] float32, bfloat16, float16 or float64 (cast to float32), K a multiple of 16; any strides, any device.
        global_scale: decode multiplier; a number, 0-d, or a tensor shaped like leading axes of `x`, such as [E] for
            [E, N, K]. None: one for the whole tensor, `nvfp4_global_scale(x)`.
        method: "max" maps each block's largest magnitude to 6, as ModelOpt does; "mse" searches nearby block scales
            for the least squared error and never does worse than "max" in any block.

    Returns:
        Codes, block scales and the global scale (float32, 0-d or of the shape given), on the device of `x`.

    Raises:
        ShapeError: a shape, dtype or value does not fit; inf and NaN do not.
        UnsupportedError: no such method.
    """
    name = "quantize_nvfp4"
    if method not in METHODS:
        raise UnsupportedError(
            f"{name}: method must be one of {', '.join(METHODS)}; got {method!r}. Choose one of these."
        )
    _check_float(name, x)
    if x.ndim == 0 or x.shape[-1] % NVFP4.block_size:
        raise ShapeError(
            f"{name}: x must have a last axis that is a multiple of {NVFP4.block_size}; got shape {tuple(x.shape)}. "
            "Pad the last axis with zeros."
        )
    x = x.detach()
    g = (
        _scale_from_amax(_amax(name, x))
        if global_scale is None
        else _check_scale(name, global_scale, x.device)
    )
    if g.shape != x.shape[:-1][: g.ndim]:
        raise ShapeError(
            f"{name}: global_scale must be a number or have the shape of leading axes of x; got {tuple(g.shape)} for x "
            f"{tuple(x.shape)}. Pass one scale per leading index, or a 0-d tensor."
        )
    packed = x.new_empty((*x.shape[:-1], NVFP4.packed_columns(x.shape[-1])), dtype=torch.uint8)
    scale = x.new_empty((*x.shape[:-1], NVFP4.scale_columns(x.shape[-1])), dtype=NVFP4.scale_dtype)
    blocks = x.unflatten(-1, (-1, NVFP4.block_size)) if x.numel() else x
    g_blocks = _over_blocks(g, scale.shape)
    packed_blocks, scale_blocks = packed.view(-1, 8), scale.view(-1)
    scratch = _Scratch(x.device, scale.numel())
    start, peaks = 0, []
    for where in _pieces(scale.shape, PIECE_BLOCKS):
        piece = _contiguous(blocks[where])
        g_piece = g if g.ndim == 0 else g_blocks[where].reshape(-1)
        parts = [slice(i, i + scratch.blocks) for i in range(0, len(piece), scratch.blocks)]
        amax = torch.cat([_block_amax(piece[part], scratch) for part in parts])
        peaks.append(amax.amax())
        s = _block_scale(amax, g_piece)
        if method == "mse":
            g_all = g_piece.expand(len(piece))
            s = torch.cat([_search_scales(piece[part], s[part], g_all[part]) for part in parts])
        step = s.float() * g_piece
        end = start + len(piece)
        for part in parts:
            _encode(piece[part], step[part], packed_blocks[start:end][part], scratch)
        scale_blocks[start:end] = s
        start = end
    if global_scale is not None and peaks:
        _check_finite(name, torch.stack(peaks).amax())
    return NVFP4Values(packed, scale, g)


def dequantize_nvfp4(q: NVFP4Values, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode `q`: e2m1 x (block_scale x global_scale) in float32, then one cast.

    Args:
        q: packed [..., K / 2], block_scale [..., K / 16], global_scale 0-d or of leading axes' shape.
        dtype: floating dtype of the result.

    Returns:
        [..., K] of `dtype`. Code 8 (minus zero) decodes to +0, as in ModelOpt.

    Raises:
        ShapeError: the parts of `q` do not belong together, or `dtype` is not a floating one.
    """
    name = "dequantize_nvfp4"
    packed, scale, g = q.packed, q.block_scale, q.global_scale.to(q.packed.device, torch.float32)
    if not dtype.is_floating_point:
        raise ShapeError(
            f"{name}: dtype must be a floating dtype; got {dtype}. Use torch.float32 or torch.bfloat16."
        )
    want = (*packed.shape[:-1], packed.shape[-1] // 8) if packed.ndim else None
    if packed.dtype != torch.uint8 or want != tuple(scale.shape) or packed.shape[-1] % 8:
        raise ShapeError(
            f"{name}: q must hold uint8 packed [..., K / 2] and block_scale [..., K / 16]; got {packed.dtype} "
            f"{tuple(packed.shape)} and {tuple(scale.shape)}. Rebuild q with quantize_nvfp4."
        )
    if g.shape != scale.shape[:-1][: g.ndim]:
        raise ShapeError(
            f"{name}: q.global_scale must be 0-d or have the shape of leading axes of q.packed; got {tuple(g.shape)} for "
            f"{tuple(packed.shape)}. Reshape it."
        )
    out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)
    flat = out.view(-1, NVFP4.block_size)
    blocks = packed.unflatten(-1, (-1, 8)) if packed.numel() else packed
    g_blocks = _over_blocks(g, scale.shape)
    size = CHUNK_BLOCKS.get(packed.device.type, CHUNK_BLOCKS["other"])
    table, start = _byte_table(packed.device), 0
    index = torch.empty(min(size, scale.numel()) * 8, dtype=torch.int32, device=packed.device)
    pairs, values = torch.empty_like(index), torch.empty_like(flat[:size], dtype=torch.float32)
    for where in _pieces(scale.shape, size):
        step = (scale[where].float() * g_blocks[where]).view(-1, 1)
        n = len(step)
        index[: n * 8].view(blocks[where].shape).copy_(blocks[where])
        torch.index_select(table, 0, index[: n * 8], out=pairs[: n * 8])
        values[:n].copy_(pairs[: n * 8].view(torch.bfloat16).view(n, NVFP4.block_size))
        target = flat[start : start + n]
        if dtype == torch.float32:
            torch.mul(values[:n], step, out=target)
        else:
            target.copy_(values[:n].mul_(step))
        start += n
    return out


def nvfp4_global_scale(x: torch.Tensor, dim: int | Sequence[int] | None = None) -> torch.Tensor:
    """The global scale (decode multiplier) of `x`: amax / (6 x 448) in float32, as ModelOpt computes it.

    All zeros give 1.0; a quotient that underflows gives the smallest subnormal, 2^-149, so that nothing decodes to NaN.

    Args:
        x: floating tensor of any shape.
        dim: axis or axes to reduce; None for all. (1, 2) gives one scale per expert of [E, N, K].

    Returns:
        float32; the shape of `x` without `dim`, 0-d for None.

    Raises:
        ShapeError: `x` is not floating or holds inf or NaN.
    """
    name = "nvfp4_global_scale"
    _check_float(name, x)
    x = x.detach()
    if dim is None:
        return _scale_from_amax(_amax(name, x))
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if not x.numel():
        return torch.ones_like(x.sum(axes), dtype=torch.float32)
    amax = torch.maximum(x.amax(axes), x.amin(axes).neg()).float()
    if amax.numel():
        _check_finite(name, amax.amax())
    return _scale_from_amax(amax)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] uint8 codes below 16, K even -> [..., K / 2] uint8, low nibble = even element."""
    _check_bytes("pack_codes", "codes", codes, 2)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """[..., K / 2] uint8 -> [..., K] uint8 codes below 16; the inverse of `pack_codes`."""
    _check_bytes("unpack_codes", "packed", packed, 1)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


class _Scratch:
    """The buffers that encode one chunk, allocated once per call."""

    def __init__(self, device: torch.device, blocks: int) -> None:
        largest = CHUNK_BLOCKS.get(device.type, CHUNK_BLOCKS["other"])
        self.blocks = max(1, min(blocks, largest))
        count = self.blocks * NVFP4.block_size
        self.floats = torch.empty(4, count, device=device)
        self.codes = torch.empty(count, dtype=torch.uint8, device=device)
        self.odd = torch.empty(count // 2, dtype=torch.int16, device=device)
        self.zero = torch.zeros(
            (), device=device
        )  # 0-d tensors: a Python number is slower in these calls
        self.round = torch.tensor([ROUND, ROUND + 2, ROUND + 4], device=device).unbind()


def _encode(x: torch.Tensor, step: torch.Tensor, packed: torch.Tensor, scratch: _Scratch) -> None:
    """Write the codes of x / step, rounded to E2M1, into packed; x [B, 16], step [B], packed [B, 8]."""
    count = x.numel()
    a, t, u, negative = scratch.floats[:, :count]
    a.view(x.shape).copy_(x)
    torch.div(a.view(x.shape), step.unsqueeze(-1), out=a.view(x.shape))
    torch.lt(a, scratch.zero, out=negative)
    a.abs_()
    # code = min(rint(2a), rint(a) + 2, rint(a / 2) + 4, 7); compared as integers, so that NaN ends as 7 too.
    plus_0, plus_2, plus_4 = scratch.round
    code = t.view(torch.int32)
    torch.add(plus_0, a, alpha=2, out=t)
    torch.add(plus_2, a, out=u)
    torch.minimum(code, u.view(torch.int32), out=code)
    torch.add(plus_4, a, alpha=0.5, out=a)
    torch.minimum(code, a.view(torch.int32), out=code)
    code.clamp_(max=ROUND_BITS + 7)
    t.add_(negative, alpha=8)
    codes = scratch.codes[:count].copy_(code)  # keeps the low byte
    word, odd = codes.view(torch.int16), scratch.odd[: count // 2]
    torch.bitwise_right_shift(word, 4, out=odd)
    packed.view(-1).copy_(word.bitwise_or_(odd))


def _block_scale(amax: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    s = amax / (NVFP4.element_max * g)
    s.add_(
        torch.eq(s, 0, out=torch.empty_like(s))
    )  # 0 -> 1; a float32 out= is far faster than a bool
    return s.clamp_(NVFP4.scale_min, NVFP4.scale_max).to(NVFP4.scale_dtype)


def _block_amax(blocks: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """[B, 16] contiguous -> [B] float32 magnitudes; inf and NaN come through.

    Magnitudes order like their bits, so this takes maxima of integers: over 64-bit words first, whose transposed
    read vectorises, then over the lanes of the word that is left.
    """
    wide = blocks.dtype == torch.float32
    lane, mask = (torch.int32, 0x7FFFFFFF7FFFFFFF) if wide else (torch.int16, 0x7FFF7FFF7FFF7FFF)
    words = blocks.view(torch.int64).t()
    magnitudes = scratch.floats[0].view(torch.int64)[: words.numel()].view(words.shape)
    torch.bitwise_and(words, mask, out=magnitudes)
    lanes = magnitudes.view(lane).amax(0).view(len(blocks), -1).unbind(-1)
    return functools.reduce(torch.maximum, lanes).view(blocks.dtype).float()


def _search_scales(x: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The e4m3 scales near s with the least squared error per block; x [B, 16], s [B], g 0-d or [B]."""
    a = torch.empty(x.shape[::-1], device=x.device)
    a.copy_(x.t()).abs_()
    first = s.view(torch.uint8).short()
    norm = (s.float() * g).reciprocal_()
    best, best_code = _block_error(a, s, g, norm), first.clone()
    for delta in MSE_WINDOW:
        code = (first + delta).clamp_(1, 126)
        error = _block_error(a, code.byte().view(NVFP4.scale_dtype), g, norm)
        # float32 sums of 16 squares are good to 2^-20, so the margin makes a win here a win in exact arithmetic.
        better = error < best * (1 - 2.0**-18)
        best, best_code = torch.where(better, error, best), torch.where(better, code, best_code)
    return best_code.byte().view(NVFP4.scale_dtype)


def _block_error(
    a: torch.Tensor, s: torch.Tensor, g: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """Sum over axis 0 of ((decoded - a) x norm)^2; a [16, B] magnitudes, s and norm [B]."""
    step = s.float() * g
    y = (a / step).clamp_(max=NVFP4.element_max)
    # Adding 2^22 x the leading power of two (at least 1) and taking it off leaves one mantissa bit, ties to even.
    power = y.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(1.0, 4.0)
    y.add_(power, alpha=2.0**22).sub_(power, alpha=2.0**22)
    y.mul_(step).sub_(a).mul_(norm)
    return y.square_().sum(0)


def _byte_table(device: torch.device) -> torch.Tensor:
    """[256] int32: the two bfloat16 values of each packed byte; E2M1 is exact in bfloat16."""
    grid = torch.tensor(NVFP4.grid, device=device)
    pairs = unpack_codes(torch.arange(256, dtype=torch.uint8, device=device)).long()
    return torch.cat((grid, 0 - grid))[pairs].bfloat16().view(torch.int32)


def _pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut a tensor of `shape` into runs of at most `limit` elements, in row-major order."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > limit:
        for i in range(shape[0]):
            for rest in _pieces(shape[1:], limit):
                yield (i, *rest)
    else:
        count = -(-shape[0] // (limit // inner))
        rows = -(-shape[0] // count)
        for i in range(0, shape[0], rows):
            yield (slice(i, i + rows),)


def _contiguous(piece: torch.Tensor) -> torch.Tensor:
    """A piece as [B, 16] that can be read as 64-bit words; copies it only where it must."""
    if piece.dtype == torch.float64:
        piece = piece.float()
    piece = piece.reshape(-1, NVFP4.block_size).contiguous()
    return piece.clone() if piece.storage_offset() * piece.element_size() % 8 else piece


def _over_blocks(g: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return g.reshape(tuple(g.shape) + (1,) * (len(shape) - g.ndim)).expand(shape)


def _amax(name: str, x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a tensor as a finite 0-d float32."""
    low_high = [
        torch.stack(torch.aminmax(x[i])) for i in _pieces(x.shape, PIECE_BLOCKS * NVFP4.block_size)
    ]
    if not low_high:
        return torch.zeros((), device=x.device)
    amax = torch.stack(low_high).float().abs().amax()
    _check_finite(name, amax)
    return amax


def _scale_from_amax(amax: torch.Tensor) -> torch.Tensor:
    smallest = 2.0**-149
    return torch.where(amax == 0, 1.0, (amax / NVFP4.amax_per_global_scale).clamp(min=smallest))


def _check_float(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ShapeError(
            f"{name}: x must be a float32, bfloat16, float16 or float64 tensor; got {got}. Cast it first."
        )


def _check_finite(name: str, amax: torch.Tensor) -> None:
    if not math.isfinite(value := float(amax)):
        raise ShapeError(
            f"{name}: x must be finite; got a largest magnitude of {value}. "
            "Replace inf and NaN (torch.nan_to_num), or find the layer that made them."
        )


def _check_scale(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    g = torch.as_tensor(value).detach().to(device, torch.float32)
    if g.numel() and not bool(((g > 0) & torch.isfinite(g)).all()):
        bad = g.flatten()[~((g > 0) & torch.isfinite(g)).flatten()][0]
        raise ShapeError(
            f"{name}: global_scale must be finite and above 0 in float32; got {float(bad)}. "
            "Pass the decode multiplier, amax / (6 x 448), or None."
        )
    return g


def _check_bytes(name: str, argument: str, value: torch.Tensor, multiple: int) -> None:
    if value.dtype != torch.uint8 or value.ndim == 0 or value.shape[-1] % multiple:
        rule = (
            "be uint8 with an even last axis"
            if multiple == 2
            else "be uint8 with at least one axis"
        )
        raise ShapeError(
            f"{name}: {argument} must {rule}; got {value.dtype} {tuple(value.shape)}. Cast or pad it."
        )
