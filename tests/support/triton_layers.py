"""Layers, tiles and compilation for the tests of the Triton kernels.

The interpreter is chosen when triton is imported: test_triton.py starts a process for its cases.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import pytest
import torch

from fp4moe import ExpertWeights
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.kernels.triton.tiles import Config, Tile
from fp4moe.reference import reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
# (major, minor) by package; what is not installed is skipped for that reason.
VERSIONS = {
    name: tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
    for name in ("numpy", "triton")
    if importlib.util.find_spec(name)
}
interpreted = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter, see the docstring"
)
compiled = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="needs the package triton, compiling"
)

# The interpreter cuts float32 to bfloat16 instead of rounding: at most 2^-8 each for the
# intermediate, the slot's output and the sum. A GPU rounds, with half of that.
CUT = 3 * 2.0**-8
MODES = {
    "sorted": Config("sorted", Tile(16, 64, 2, 4, 3), Tile(32, 64, 2, 4, 3)),
    "more": Config("sorted", Tile(16, 32, 1, 4, 3, 16), Tile(32, 128, 1, 4, 3, 16)),
    "slot": Config("slot", Tile(16, 64, 2, 4, 3), Tile(16, 64, 2, 4, 3)),
}


# Activation, whether gated, tokens, dtype: what runs on a GPU in each format.
ON_THE_GPU = [
    ("gelu_tanh", True, 1, torch.bfloat16),
    ("gelu", True, 5, torch.float32),
    ("relu2", False, 33, torch.float16),
    ("silu_step(limit=0.2)", True, 300, torch.bfloat16),
    ("relu2", False, 2100, torch.bfloat16),
]


def layer(experts, hidden, intermediate, activation, gated, device="cpu", biased=False, **keywords):
    def weight(*size):
        return torch.randn(experts, *size, device=device)

    if biased:
        sizes = {"up_bias": intermediate, "down_bias": hidden}
        sizes |= {"gate_bias": intermediate} if gated else {}
        keywords |= {name: weight(size) for name, size in sizes.items()}
    return ExpertWeights.quantize(
        up=weight(intermediate, hidden),
        gate=weight(intermediate, hidden) if gated else None,
        down=weight(hidden, intermediate),
        activation=activation,
        **keywords,
    )


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def compare(config, weights, dtype, tokens, top_k, limit, device="cpu", run=run_with):
    """Run ids inside and outside the window, one twice in a row, and compare with reference."""
    # Small enough that the square of relu2 stays below float16's largest number.
    hidden = (torch.randn(tokens, weights.hidden_size, device=device) / 16).to(dtype)
    ids = torch.randint(-1, weights.num_experts + 1, (tokens, top_k), device=device)
    ids[0] = weights.expert_offset
    routing_weights = torch.rand(tokens, top_k, device=device)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    call = prepared.call(hidden, ids, routing_weights)
    assert (call.operands.gate_up_bias is not None) == weights.biased
    got = run(config, call)
    expected = reference(hidden.float(), weights, ids, routing_weights)
    assert got.dtype == dtype and got.shape == hidden.shape
    assert relative(got, expected) < limit
    assert torch.equal(got, run(config, call))


def check_variants(variants, capability):
    """Compile (function, constants, warps, further) each; look at products and shared memory."""
    for function, constants, warps, further in variants:
        if "WAIT" in constants:
            constants = {**constants, "WAIT": capability == 90}
        kernel = compile_for(capability, function, constants, warps, further)
        label = (function.__name__, constants)
        assert kernel.asm["cubin"], label
        # No product stays in flight beyond its step: its registers would be written too early.
        assert not re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", kernel.asm["ptx"]), label
        # 86, 89 and 120 have 99 KiB of shared memory a block, the others 163 KiB and more.
        limit = (99 if capability in (86, 89, 120) else 163) * 1024
        assert kernel.metadata.shared <= limit, (label, kernel.metadata.shared)


def signature(function, constants, hidden="*bf16", pointers=None):
    """Argument types by name, pointers and multiples of 16 as a call of real sizes has them."""
    others = pointers or {}
    pointers = {
        "hidden": hidden,
        "x": "*bf16",
        "gate_up": "*bf16",
        "ids": "*i64",
        "out": "*bf16",
        "partial": "*bf16",
    }
    pointers |= dict.fromkeys(("counts", "order", "tiles", "num_tiles", "words", "scales"), "*i32")
    pointers |= dict.fromkeys(
        ("global_scale", "routing_weights", "weights", "bias", "output_scale"), "*fp32"
    )
    pointers |= {"logits": "*bf16", "table": "*i64", "expected": "*i64", "changed": "*i32"}
    pointers |= others
    types = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in function.arg_names
    }
    if "scaling" in types:
        types["scaling"] = "fp32"
    plain = {"num_slots", "expert_offset", "top_k", "slabs", "num_groups", "scaling"}
    aligned = [
        (i,) for i, n in enumerate(function.arg_names) if types[n] != "constexpr" and n not in plain
    ]
    return types, {place: [["tt.divisibility", 16]] for place in aligned}


def compile_for(capability, function, constants, warps, further):
    """Compile a kernel ahead of time, with ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, attributes = signature(function, constants, **further)
    places = {(function.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    target = GPUTarget("cuda", capability, 32)
    source = source(function, types, places, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})
