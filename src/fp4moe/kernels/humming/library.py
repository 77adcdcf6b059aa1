"""humming-kernels as it is installed: version, toolchain, weight layout, one compiled GEMM.

Decides: which versions and toolchains will do, which of its tile shapes are compiled, that none of
them splits the contraction (such sums are not ordered). Imported on first use only. Not here: the
mixture of experts, see kernel.py. Source: humming-kernels 0.1.19.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

import torch

from ...errors import refuse
from ...version import installed

__all__ = [
    "GemmShape",
    "HummingGemm",
    "compile_gemm",
    "library_reasons",
    "pack_scales",
    "pack_weights",
    "toolchain_reasons",
    "toolkit_variables",
    "unpack_scales",
    "unpack_weights",
]

PACKAGE = "humming-kernels"
# The layout below is that of 0.1.x; no other version was read.
OLDEST, BELOW = (0, 1, 19), (0, 2, 0)
HEADERS = ("cuda_runtime.h", "nvrtc.h", "cuda/std/cstdint")
TILE_ROWS, MMA_COLUMNS = 64, 16
EVERY_SIZE = 1 << 30


def library_reasons() -> tuple[str, ...]:
    """Return why humming-kernels cannot be used, without importing it."""
    version = installed(PACKAGE)
    major = (torch.version.cuda or "13").partition(".")[0]
    install = f"run pip install '{PACKAGE}[cu{major}]==0.1.19'"
    if version is None:
        return (f"{PACKAGE} is not installed; {install}",)
    key = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not OLDEST <= key < BELOW:
        return (f"{PACKAGE} {version} is not known, 0.1.19 and later 0.1 are; {install}",)
    reasons = [
        f"{PACKAGE} needs {package}, which is not installed; run pip install {package}"
        for module, package in (("triton", "triton"), ("cuda", "cuda-bindings"))
        if importlib.util.find_spec(module) is None
    ]
    if torch.version.cuda is None:
        return (*reasons, f"{PACKAGE} needs a torch built for CUDA, got {torch.__version__}")
    return (*reasons, *toolchain_reasons(toolkit_roots(major), major))


# Dynamo cannot follow package metadata. Its decorator would import it with this package.
library_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def toolkit_variables() -> tuple[str | None, str | None]:
    """Return the environment variables that name a toolkit."""
    return os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")


def toolkit_roots(major: str) -> list[pathlib.Path]:
    """Return where humming-kernels looks for CUDA: system folders, then wheels of NVIDIA."""
    system = [*toolkit_variables(), "/usr/local/cuda"]
    roots = [pathlib.Path(root) for root in system if root]
    roots += sorted(pathlib.Path("/usr/local").glob("cuda-*"))
    wheels = "nvidia" if major == "12" else f"nvidia/cu{major}"
    roots += [pathlib.Path(entry) / wheels for entry in sys.path]
    return [root for root in roots if root.is_dir()]


def toolchain_reasons(roots: list[pathlib.Path], major: str) -> list[str]:
    """Return why none of the folders can compile for CUDA `major`, naming what is missing."""
    reasons = []
    for root in dict.fromkeys(root.resolve() for root in roots):
        found = _system_major(root)
        if found not in (None, major):
            reasons.append(f"{root} is CUDA {found}")
            continue
        include = [*root.glob("include"), *root.glob("*/include")]
        include += [folder / "cccl" for folder in include]
        missing = [name for name in HEADERS if not any((f / name).is_file() for f in include)]
        # Folders of libraries differ: toolkit lib64, wheels lib, wheels of CUDA 12 one deeper.
        if not any(any(root.glob(f"{f}/libnvrtc.so*")) for f in ("lib64", "lib", "*/lib")):
            missing.append("libnvrtc.so")
        if not missing:
            return []
        reasons.append(f"{root} lacks {', '.join(missing)}")
    where = "; ".join(reasons) or "no folder of it was found"
    return [
        f"{PACKAGE} compiles with NVRTC and needs the CUDA {major} toolkit: {where}; run pip "
        f"install '{PACKAGE}[cu{major}]' or set CUDA_HOME"
    ]


def _system_major(root: pathlib.Path) -> str | None:
    try:
        version = json.loads((root / "version.json").read_text("utf-8"))["cuda"]["version"]
    except (OSError, ValueError, KeyError):
        return None
    return str(version).partition(".")[0]


def pack_weights(packed: torch.Tensor) -> torch.Tensor:
    """Reorder codes for 16-bit activations on compute capability 7.5 to 9.0.

    Args:
        packed: uint8 [L, N, K/2], low nibble = even column; N a multiple of 64, K of 16.

    Returns:
        uint8 of the same shape, whose bytes are int32 [L, K/16, 2N] to the library. Every 16
        columns of 64 rows are 512 bytes; a byte holds column c (low nibble) and c + 8.
    """
    experts, rows, columns = packed.shape
    # [L, row tile, 16s, 8s, row, column tile, c / 8, c % 8 / 2], and even and odd c in the byte.
    x = packed.reshape(experts, rows // TILE_ROWS, 4, 2, 8, columns // 8, 2, 4)
    low, high = x.unbind(6)
    even, odd = (low & 15) | (high << 4), (low >> 4) | (high & 240)
    x = torch.stack((even, odd), -1)
    return x.permute(0, 5, 1, 4, 6, 2, 7, 3).reshape(packed.shape)


def unpack_weights(laid_out: torch.Tensor) -> torch.Tensor:
    """Undo `pack_weights`."""
    experts, rows, columns = laid_out.shape
    x = laid_out.reshape(experts, columns // 8, rows // TILE_ROWS, 8, 4, 4, 2, 2)
    even, odd = x.permute(0, 2, 5, 7, 3, 1, 4, 6).unbind(-1)
    low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 240)
    return torch.stack((low, high), 6).reshape(laid_out.shape)


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """Reorder block scales to match `pack_weights`.

    Args:
        scale: uint8 [L, N, K/16], N a multiple of 64.

    Returns:
        uint8 of the same shape, whose bytes are [L, K/16, N] to the library, 8 x 8 rows transposed.
    """
    x = scale.reshape(scale.shape[0], scale.shape[1] // TILE_ROWS, 8, 8, scale.shape[2])
    return x.permute(0, 4, 1, 3, 2).reshape(scale.shape)


def unpack_scales(laid_out: torch.Tensor) -> torch.Tensor:
    """Undo `pack_scales`."""
    experts, rows, columns = laid_out.shape
    x = laid_out.reshape(experts, columns, rows // TILE_ROWS, 8, 8)
    return x.permute(0, 2, 4, 3, 1).reshape(laid_out.shape)


class GemmShape(NamedTuple):
    """The weights [L, N, K] of one GEMM.

    Attributes:
        experts: L. rows, columns: N and K, padded.
        cut_rows, cut_columns: how much of N is not written and how much of K the input lacks.
    """

    experts: int
    rows: int
    columns: int
    cut_rows: int
    cut_columns: int


class Interval(NamedTuple):
    """A kernel, and up to how many routed rows it is used; its tile has `tile_rows` of them."""

    most_rows: int
    tile_rows: int
    configs: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class HummingGemm:
    """One GEMM, compiled for one device and every number of rows."""

    shape: GemmShape
    dtype: torch.dtype
    intervals: tuple[Interval, ...]
    launch: Any

    def interval(self, rows: int) -> Interval:
        """Return the kernel for a number of routed rows."""
        return self.intervals[bisect.bisect_left(self.intervals, rows, key=lambda i: i.most_rows)]

    def run(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        packed: torch.Tensor,
        block_scale: torch.Tensor,
        global_scale: torch.Tensor,
        *,
        place: dict[str, torch.Tensor],
        top_k: int,
        interval: Interval,
    ) -> None:
        """Write out[s] = x[s // top_k] @ weights of its expert, for each slot s in sorted_ids.

        Args:
            x: [T, K - cut_columns]. out: [T * top_k, N - cut_rows], of self.dtype. packed,
                block_scale: as `pack_weights` and `pack_scales` return. global_scale: [L].
            place: sorted_ids, expert_ids and num_tokens_padded, int32, in tiles of
                interval.tile_rows slots; a slot of T * top_k is padding.
        """
        experts, rows, columns = self.shape[:3]
        self.launch(
            configs=interval.configs,
            inputs=x,
            outputs=out,
            weight=packed.view(torch.int32).view(experts, columns // MMA_COLUMNS, rows * 2),
            weight_scale=block_scale.view(torch.float8_e4m3fn).view(experts, columns // 16, rows),
            weight_scale_2=global_scale,
            top_k=top_k,
            valid_shape_m=1,
            **place,
        )


@functools.lru_cache(maxsize=256)
def compile_gemm(shape: GemmShape, dtype: torch.dtype, device_index: int) -> HummingGemm:
    """Compile the library's kernels for one GEMM, all tile shapes that its heuristics name.

    About 20 kernels of some seconds of one core each; the library keeps them on disk.

    Raises:
        UnsupportedError: the library or its toolchain is missing, or a CUDA graph is captured.
    """
    reasons = library_reasons()
    if reasons:
        refuse("moe", "humming-kernels cannot be used", "; ".join(reasons), "See fp4moe.why_not.")
    if torch.cuda.is_current_stream_capturing():
        what = f"the GEMM {shape} of humming-kernels cannot be compiled for device {device_index}"
        reason = "a CUDA graph is being captured"
        refuse("moe", what, reason, "Prepare the weights on this device first.")
    from humming import ops
    from humming.config import LayerConfig
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    device = torch.device("cuda", device_index)
    with torch.cuda.device(device):
        layer = LayerConfig(**layer_arguments(shape, dtype))
        compute = {"gemm_type": "indexed", "use_batch_invariant": False}
        tuning = [
            (low, high, {**config, "use_stream_k": False})
            for low, high, config in get_heuristics_config(layer, **compute, device=device)
        ]
        compiled = HummingKernel.prepare_kernels(
            layer.to_str(), json.dumps(compute), tuning, device
        )
    # A launch takes one entry for every size: which one was decided when the rows were sorted.
    intervals = tuple(
        Interval(
            high,
            config["block_shape"][0],
            torch.tensor([0, EVERY_SIZE, *kernel], dtype=torch.int64, device="cpu"),
        )
        for (_, high, config), (_, _, *kernel) in zip(
            tuning, compiled.view(-1, 4).tolist(), strict=True
        )
    )
    return HummingGemm(shape, dtype, intervals, ops.launch_kernel)


def layer_arguments(shape: GemmShape, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of the library's LayerConfig for NVFP4 weights."""
    name = str(dtype).removeprefix("torch.")
    return {
        "a_dtype": name,
        "b_dtype": "float4e2m1",
        "c_dtype": name,
        "bs_dtype": "float8e4m3",
        "shape_n": shape.rows,
        "shape_k": shape.columns,
        "pad_shape_n": shape.cut_rows,
        "pad_shape_k": shape.cut_columns,
        "num_experts": shape.experts,
        "weight_scale_group_size": 16,
        "weight_scale_type": "group",
        "weight_scale_2_type": "tensor",
    }
