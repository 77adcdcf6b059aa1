"""What must work right after `pip install` with torch alone; `make release` runs it."""

from __future__ import annotations

import subprocess
import sys

import torch

import fp4moe

torch.manual_seed(0)
gate, up = torch.randn(2, 4, 32, 64)
down = torch.randn(4, 64, 32)
hidden, ids, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
for format in fp4moe.formats.FORMATS:
    packed = fp4moe.ExpertWeights.quantize(
        gate=gate, up=up, down=down, activation="silu", format=format
    )
    out = fp4moe.fused_moe(hidden, packed, ids, weights)
    parts = packed.dequantize()
    expected = torch.zeros_like(hidden)
    for token in range(5):
        for slot in range(2):
            e, x = int(ids[token, slot]), hidden[token]
            inner = torch.nn.functional.silu(parts["gate"][e] @ x) * (parts["up"][e] @ x)
            expected[token] += weights[token, slot] * (parts["down"][e] @ inner)
    # Three float32 sums of at most 64 products.
    assert float((out - expected).norm() / expected.norm()) < 5 * 64 * 2**-24, format
for arguments in (["--version"], ["info"], ["quantize", "--help"]):
    subprocess.run([sys.executable, "-m", "fp4moe", *arguments], check=True, capture_output=True)
versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
print(f"fp4moe {fp4moe.__version__}, {versions}: fine")
