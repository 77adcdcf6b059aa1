"""Speed and accuracy of the NVFP4 quantiser, after a bitwise check against ModelOpt.

    python benchmarks/bench_quantize.py --experts 16

GB/s counts the bfloat16 input of a quantiser, or the bfloat16 size of what is decoded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from machine import cpu_name
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

from fp4moe.formats.nvfp4 import dequantize_nvfp4, quantize_nvfp4


def best_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Shortest of `repeats` calls after one warm-up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def modelopt_decode(q, scale, global_scale, dtype=torch.float32) -> torch.Tensor:
    return q.dequantize(dtype, scale=scale, double_scale=global_scale, block_sizes={-1: 16})


def difference(x: torch.Tensor) -> str:
    """What differs from ModelOpt on `x`; empty where nothing does."""
    ours = quantize_nvfp4(x)
    q, scale, global_scale = NVFP4QTensor.quantize(x.clone(), 16)
    parts = {
        "packed codes": torch.equal(ours.packed, q._quantized_data),
        "block scales": torch.equal(ours.block_scale.view(torch.uint8), scale.view(torch.uint8)),
        "global scale": torch.equal(ours.global_scale, global_scale),
        "decoded values": torch.equal(
            dequantize_nvfp4(ours), modelopt_decode(q, scale, global_scale)
        ),
    }
    return ", ".join(name for name, same in parts.items() if not same)


def relative_rms(x: torch.Tensor, method: str) -> float:
    error = dequantize_nvfp4(quantize_nvfp4(x, method=method)) - x.float()
    return float(error.norm() / x.float().norm())


def main() -> int:
    """Print the table; 1 where the result differs from ModelOpt's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=16, help="tensor is [experts, 1408, 2816]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.randn(args.experts, 1408, 2816, device=device, dtype=torch.bfloat16)

    if different := difference(x[0, :256]):
        print(f"bench_quantize: {different} differ from ModelOpt; no speed is worth printing.")
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"[{args.experts}, 1408, 2816] bfloat16; equal to ModelOpt bit for bit")

    gigabytes = x.numel() * 2 / 1e9
    part = x[:1]  # ModelOpt and "mse" are slow, and their speed does not depend on the size
    q, their_q = quantize_nvfp4(x), NVFP4QTensor.quantize(part.clone(), 16)
    rows: list[tuple[str, Callable[[], object], float]] = [
        ("quantize max", lambda: quantize_nvfp4(x), gigabytes),
        ("quantize max, scale given", lambda: quantize_nvfp4(x, 0.002), gigabytes),
        ("quantize mse", lambda: quantize_nvfp4(part, method="mse"), gigabytes / args.experts),
        ("dequantize float32", lambda: dequantize_nvfp4(q), gigabytes),
        ("dequantize bfloat16", lambda: dequantize_nvfp4(q, torch.bfloat16), gigabytes),
        ("ModelOpt quantize", lambda: NVFP4QTensor.quantize(part, 16), gigabytes / args.experts),
        (
            "ModelOpt dequantize float32",
            lambda: modelopt_decode(*their_q),
            gigabytes / args.experts,
        ),
    ]
    speed: dict[str, float] = {}
    for label, call, size in rows:
        speed[label] = size / best_seconds(call, args.repeats, device)
        print(f"{label:28s} {speed[label]:8.3f} GB/s", flush=True)
    ratio = speed["quantize max"] / speed["ModelOpt quantize"]
    decode = speed["dequantize float32"] / speed["ModelOpt dequantize float32"]
    print(f"ratio to ModelOpt: quantize max {ratio:.1f}, dequantize float32 {decode:.1f}")

    student = torch.randn(512, 2816) / torch.randn(4, 512, 2816).square().mean(0).sqrt()
    for label, w in (("Gaussian", torch.randn(512, 2816)), ("Student-t(4)", student)):
        plain, mse = (relative_rms(w.to(device), m) for m in ("max", "mse"))
        print(f"relative RMS error, {label:12s} max {plain:.4f}, mse {mse:.4f} ({mse / plain:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
