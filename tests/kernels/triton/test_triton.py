"""The Triton kernels: layout, routing, results in the interpreter, compilation for every target.

The interpreter is chosen when triton is imported, so its cases, and those of test_fingerprint.py
and test_triton_rows.py, run in a process of their own, with TRITON_INTERPRET=1; they are skipped
here and started by test_the_interpreter_agrees.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from fp4moe import ExpertWeights
from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import UnsupportedError
from fp4moe.formats.nvfp4 import NVFP4Values, dequantize_nvfp4
from fp4moe.identity import fingerprint
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.kernels.triton.layout import from_slabs, scales_from_slabs, scales_to_slabs, to_slabs
from fp4moe.kernels.triton.tiles import Config, Tile
from fp4moe.layer import Layer, Routing
from fp4moe.ops import nvfp4_moe_from_logits_arguments
from fp4moe.reference import reference
from fp4moe.routing import route, softmax_topk

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
if INTERPRETED and HAS_TRITON:
    # Here, since a kernel sees the names of its module alone.
    import triton
    import triton.language as tl

    from fp4moe.kernels.triton.choose import choose_experts
    from fp4moe.kernels.triton.decode_nvfp4 import decode_slabs

    @triton.jit
    def decode(words, scales, out, ROWS: tl.constexpr, FP16: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        word_at = row[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        word = tl.load(words + word_at).to(tl.uint32, bitcast=True)
        scale = tl.load(scales + row[None, :]).to(tl.uint32, bitcast=True)
        values = decode_slabs(word, scale, 1, ROWS, FP16, False)
        tl.store(out + row[:, None] * 64 + tl.arange(0, 64)[None, :], values)


TILES = sorted({c for layer in read(SHIPPED) for c in layer.tiles.values()}, key=str)
LAYER, HOPPER = Layer("silu", True, 2816, 704, 128, 8), (9, 0)
# The interpreter cuts float32 to bfloat16 instead of rounding: at most 2^-8 each for the
# intermediate, the slot's output and the sum. A GPU rounds, with half of that.
CUT = 3 * 2.0**-8
MODES = {
    "sorted": Config("sorted", Tile(16, 64, 2, 4, 3), Tile(32, 64, 2, 4, 3)),
    "more": Config("sorted", Tile(16, 32, 1, 4, 3, 16), Tile(32, 128, 1, 4, 3, 16)),
    "slot": Config("slot", Tile(16, 64, 2, 4, 3), Tile(16, 64, 2, 4, 3)),
}


def layer(experts, hidden, intermediate, activation, gated, device="cpu", **keywords):
    def weight(*size):
        return torch.randn(experts, *size, device=device)

    return ExpertWeights.quantize(
        up=weight(intermediate, hidden),
        gate=weight(intermediate, hidden) if gated else None,
        down=weight(hidden, intermediate),
        activation=activation,
        **keywords,
    )


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 128, 96)])
def test_the_layout_has_an_exact_inverse(shape):
    packed = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale = torch.randint(0, 256, (*shape[:2], shape[2] // 8 * 4), dtype=torch.uint8)
    assert torch.equal(from_slabs(to_slabs(packed)), packed)
    assert torch.equal(scales_from_slabs(scales_to_slabs(scale)), scale)
    assert not torch.equal(to_slabs(packed), packed)


@pytest.mark.parametrize("gated", [True, False])
def test_restore_undoes_prepare(gated):
    weights = layer(2, 80, 48, "silu", gated)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    assert prepared.operands.down_packed.shape == (2, 128, 32)
    back = TRITON.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("capability", "change", "reason"),
    [
        (None, {}, "needs compute capability 8.0 or newer, got a CPU"),
        ((7, 5), {}, "needs compute capability 8.0 or newer, got 7.5"),
        (HOPPER, {"num_experts": 513}, "num_experts must be at most 512, got 513"),
        (HOPPER, {"top_k": 33}, "top_k must be at most 32, got 33"),
    ],
)
def test_reasons(capability, change, reason):
    layer = dataclasses.replace(LAYER, **change)
    assert reason in TRITON.reasons_not_to_run(layer, capability)
    assert reason not in TRITON.reasons_not_to_run(LAYER, HOPPER)


def test_without_padding_sizes_are_multiples_of_a_slab():
    assert TRITON.reasons_without_padding(LAYER) == []
    odd = dataclasses.replace(LAYER, hidden_size=2832)
    assert TRITON.reasons_without_padding(odd) == [
        "hidden_size must be a multiple of 64 without padding, got 2832"
    ]


@compiled
def test_a_cpu_is_refused():
    weights = layer(1, 64, 64, "silu", True)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    ids, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(UnsupportedError, match=r"^triton: hidden must be on .* got cpu \(a CPU\)"):
        TRITON(prepared.call(torch.zeros(1, 64), ids, one))


@interpreted
@pytest.mark.parametrize("fp16", [False, True])
def test_every_byte_times_every_scale(fp16):
    # 127 scales x 256 bytes: a block holds 8 bytes, a row 4 blocks.
    packed = torch.arange(256, dtype=torch.uint8).repeat(127).reshape(1, -1, 32)
    scale = torch.arange(127, dtype=torch.uint8).repeat_interleave(32).reshape(1, -1, 4)
    rows = packed.shape[1]
    padding = -rows % 64
    packed = torch.nn.functional.pad(packed, (0, 0, 0, padding))
    scale = torch.nn.functional.pad(scale, (0, 0, 0, padding))
    out = torch.empty(rows + padding, 64, dtype=torch.float16 if fp16 else torch.bfloat16)
    words, scales = to_slabs(packed).view(torch.int32), scales_to_slabs(scale).view(torch.int32)
    decode[(out.shape[0] // 64,)](words, scales, out, 64, fp16)
    values = NVFP4Values(packed[0], scale[0].view(torch.float8_e4m3fn), torch.ones(()))
    assert torch.equal(out.float() * 128, dequantize_nvfp4(values))


def run_ptx(program, inputs, dtype):
    """Interpret the decoder's straight-line PTX on tensors of 32-bit values held in int64."""
    registers = dict(inputs)

    def value(name):
        return int(name, 0) if name[0].isdigit() else registers[name]

    def halves(word):
        word = torch.as_tensor(word)
        both = torch.stack((word & 0xFFFF, word >> 16), -1)
        return torch.where(both > 0x7FFF, both - 0x10000, both).to(torch.int16).view(dtype)

    def joined(pair):
        bits = pair.contiguous().view(torch.int16).long() & 0xFFFF
        return bits[..., 0] | bits[..., 1] << 16

    def funnel(high, low, shift):
        return ((torch.as_tensor(high) << 32 | low) >> shift) & 0xFFFFFFFF

    # The exact product, rounded once; adding -0 changes nothing.
    def product(a, b, *minus_zero):
        assert minus_zero in ((), (0x80008000,))
        return joined((halves(a).float() * halves(b).float()).to(dtype))

    operations = {
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
        "shf.l.wrap.b32": lambda low, high, by: funnel(high, low, 32 - by),
        "shf.r.wrap.b32": lambda low, high, by: funnel(high, low, by),
        "lop3.b32": lambda a, b, c, table: {0xE4: a & c | b & ~c, 0xEC: a & c | b}[table],
        "fma.rn.bf16x2": product,
        "mul.f16x2": product,
    }
    for line in program.split("\n")[3:-1]:
        name, _, rest = line.rstrip(";").partition(" ")
        if name != "mov.b32":
            out, *names = rest.split(", ")
            registers[out] = operations[name](*map(value, names))
        elif rest.startswith("{"):
            low, high, word = rest.replace("{", "").replace("}", "").split(", ")
            registers[low], registers[high] = value(word) & 0xFFFF, value(word) >> 16
        elif rest.endswith("}"):
            out, low, high = rest.replace("{", "").replace("}", "").split(", ")
            registers[out] = value(low) | value(high) << 16
        else:
            out, word = rest.split(", ")
            registers[out] = value(word)
    return torch.stack([halves(registers[f"${i}"])[..., 0] for i in range(16)], -1)


@compiled
@pytest.mark.parametrize("fp16", [False, True])
def test_the_ptx_decodes_every_byte_times_every_scale(fp16):
    from fp4moe.kernels.triton import decode_nvfp4 as triton_decode

    packed = torch.randint(0, 256, (1, 64, 32 * 127), dtype=torch.uint8)
    packed[0, 0] = torch.arange(packed.shape[2]).to(torch.uint8)
    scale = torch.arange(127, dtype=torch.uint8).repeat_interleave(4).expand(1, 64, -1)
    values = NVFP4Values(packed, scale.contiguous().view(torch.float8_e4m3fn), torch.ones(()))
    words = to_slabs(packed).view(torch.int32).view(127, 64, 4, 2).long() & 0xFFFFFFFF
    scales = scales_to_slabs(scale).view(torch.int32).view(127, 64, 1).long() & 0xFFFFFFFF
    scales = scales.expand(-1, -1, 4)
    program = triton_decode.FLOAT16_PROGRAM if fp16 else triton_decode.BFLOAT16_PROGRAM
    inputs = {"$16": words[..., 0], "$17": words[..., 1], "$18": scales}
    got = run_ptx(program.value, inputs, torch.float16 if fp16 else torch.bfloat16)
    # [slab, row, lane, (word, block, half), place] to [row, slab, (word, block, half), lane, place]
    columns = got.float().view(127, 64, 4, 8, 2).permute(1, 0, 3, 2, 4).reshape(64, -1)
    assert torch.equal(columns * 128, dequantize_nvfp4(values)[0])


@interpreted
@pytest.mark.parametrize("slots", [16, 32])
@pytest.mark.parametrize(("count", "counted"), [(1, False), (300, False), (1, True), (300, True)])
def test_sorted_tiles(count, counted, slots):
    from fp4moe.kernels.triton.sort import count_kernel, place_kernel, scan_kernel, sort_kernel

    offset, local, chunk = 2, 5, 32
    ids = torch.randint(-1, 9, (count,))
    most, chunks = min(count, -(-count // slots) + local), -(-count // chunk)
    order = torch.full((most * slots,), 99, dtype=torch.int32)
    tiles, total = torch.full((most,), 99, dtype=torch.int32), torch.zeros(1).int()
    counts = torch.full(((chunks + 1) * 8,), 99, dtype=torch.int32)
    sizes = {"EXPERTS": 8, "CHUNK": chunk}
    if counted:
        count_kernel[(chunks,)](ids, counts, count, offset, local, **sizes)
        scan_kernel[(4,)](counts, chunks, EXPERTS=8, BLOCK=2)
        place_kernel[(max(chunks, local),)](
            ids, counts, order, tiles, total, count, offset, local, chunks, SLOTS=slots, **sizes
        )
    else:
        sort_kernel[(local,)](ids, order, tiles, total, count, offset, local, SLOTS=slots, **sizes)
    number = 0
    for expert in range(local):
        mine = (ids == expert + offset).nonzero().flatten().tolist()
        for start in range(0, len(mine), slots):
            slot = mine[start : start + slots]
            assert divmod(tiles[number].item(), 1024) == (expert, len(slot))
            assert order[number * slots :][: len(slot)].tolist() == slot
            number += 1
    assert total.item() == number


def compare(config, weights, dtype, tokens, top_k, limit, device="cpu"):
    """Run ids inside and outside the window, one twice in a row, and compare with reference."""
    # Small enough that the square of relu2 stays below float16's largest number.
    hidden = (torch.randn(tokens, weights.hidden_size, device=device) / 16).to(dtype)
    ids = torch.randint(-1, weights.num_experts + 1, (tokens, top_k), device=device)
    ids[0] = weights.expert_offset
    routing_weights = torch.rand(tokens, top_k, device=device)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    call = prepared.call(hidden, ids, routing_weights)
    got = run_with(config, call)
    expected = reference(hidden.float(), weights, ids, routing_weights)
    assert got.dtype == dtype and got.shape == hidden.shape
    assert relative(got, expected) < limit
    assert torch.equal(got, run_with(config, call))


@interpreted
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("activation", "gated", "dtype"),
    [
        ("gelu_tanh", True, torch.bfloat16),
        ("relu2", False, torch.float16),
        ("silu", True, torch.float32),
    ],
)
def test_small_layers(mode, activation, gated, dtype, poisoned_empty):
    weights = layer(2, 80, 144, activation, gated, num_experts=4, expert_offset=1)
    compare(MODES[mode], weights, dtype, 2, 2, CUT)


@interpreted
def test_a_tile_holds_more_slots_than_a_power_of_two(poisoned_empty):
    # One expert, and 2 of 3 ids are not its: 16 to 32 of 70 slots with all but certainty.
    weights = layer(1, 64, 64, "relu2", False)
    compare(MODES["more"], weights, torch.bfloat16, 35, 2, CUT)


def compare_choices(routing, experts, device, tokens):
    """Distinct logits in strided rows: the ids of `fp4moe.routing`, and its weights."""
    from fp4moe.kernels.triton.choose import choose_experts

    scales = [torch.empty(0), torch.linspace(0.5, 2, experts)]
    generator = torch.Generator().manual_seed(experts)
    rows = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
    # Exact in bfloat16, as whole numbers below 256 are.
    logits = torch.nn.functional.pad((torch.stack(rows) - experts // 2) / 32, (0, 5))
    bias = torch.linspace(-0.7, 0.3, experts)[rows[0]]
    biases = [bias[:0], bias] if routing.method == "sigmoid_topk" else [bias[:0]]
    for dtype, bias, scale in itertools.product((torch.float32, torch.bfloat16), biases, scales):
        args = (logits.to(device, dtype)[:, :experts], bias.to(device), routing, scale.to(device))
        ids, weights = choose_experts(*args)
        expected_ids, expected = route(*args)
        assert torch.equal(ids, expected_ids)
        # exp, 1 / x and a sum of at most 32 in float32: some 2^-23 each.
        torch.testing.assert_close(weights, expected, rtol=64 * 2.0**-23, atol=1e-30)


ROUTINGS = [
    (Routing("softmax_topk", 8), 128),
    (Routing("softmax_topk", 1, scaling=0.5), 3),
    (Routing("softmax_topk", 5), 5),
    (Routing("sigmoid_topk", 6, scaling=2.5), 128),
    (Routing("sigmoid_topk", 8, 8, 4, 2.5), 256),
    (Routing("sigmoid_topk", 3, 5, 2), 60),
    (Routing("sigmoid_topk", 22), 250),
]


@interpreted
@pytest.mark.parametrize(("routing", "experts"), ROUTINGS, ids=str)
def test_experts_are_chosen_as_defined(routing, experts, poisoned_empty):
    compare_choices(routing, experts, "cpu", 3)


@interpreted
def test_chosen_by_hand():
    # Groups score 0.9 + 0.8, 0.99 + 0.1 and 0.85 + 0.8; the second is dropped with the largest of
    # all. The bias lifts expert 5 over expert 0; weights are the sigmoids, without the bias.
    scores = torch.tensor([[0.9, 0.8, 0.99, 0.1, 0.8, 0.85]])
    bias = torch.tensor([0, 0, 0, 0, 0, 0.06])
    logits = torch.log(scores / (1 - scores))
    none = torch.empty(0)
    ids, weights = choose_experts(logits, bias, Routing("sigmoid_topk", 3, 3, 2, 2.0), none)
    assert ids.tolist() == [[5, 0, 1]]
    total = 0.85 + 0.9 + 0.8
    expected = torch.tensor([[0.85, 0.9, 0.8]]) * 2 / total
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    # Among equals the lowest; one logit of minus infinity among the chosen gives a weight of 0.
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [-torch.inf, -torch.inf, 0.0, -torch.inf]])
    ids, weights = choose_experts(logits, none, Routing("softmax_topk", 2), none)
    assert ids.tolist() == [[1, 2], [2, 0]]
    assert weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]


@interpreted
def test_from_logits_is_the_choice_and_then_the_experts(poisoned_empty):
    weights = layer(4, 64, 64, "silu", True)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    hidden, logits = torch.randn(3, 64).bfloat16(), torch.randn(3, 4)
    routing, none = Routing("softmax_topk", 2), torch.empty(0)
    arguments = nvfp4_moe_from_logits_arguments(prepared, routing, TRITON.name)
    got = torch.ops.fp4moe.nvfp4_moe_from_logits.default(hidden, logits, none, *arguments)
    ids, routing_weights = softmax_topk(logits, 2, renormalize=True)
    assert relative(got, reference(hidden.float(), weights, ids, routing_weights)) < CUT


@interpreted
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated):
    compare(MODES["sorted"], layer(1, 64, 64, activation, gated), torch.bfloat16, 1, 1, CUT)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.skipif(
    HAS_TRITON and VERSIONS["numpy"] >= (2, 4) and VERSIONS["triton"] < (3, 7),
    reason="needs triton 3.7 or numpy below 2.4: the interpreter of 3.6 reads arrays as scalars",
)
def test_the_interpreter_agrees():
    file = pathlib.Path(__file__)
    others = (
        file.with_name("test_triton_rows.py"),
        file.parents[2] / "identity/test_fingerprint.py",
    )
    files = [str(file), *map(str, others)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:xdist", "-W", "ignore"],
        cwd=file.parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "needs Triton's interpreter" not in done.stdout, done.stdout[-4000:]


def signature(function, constants, hidden="*bf16"):
    """Argument types by name, pointers and multiples of 16 as a call of real sizes has them."""
    pointers = {
        "hidden": hidden,
        "x": "*bf16",
        "gate_up": "*bf16",
        "ids": "*i64",
        "out": "*bf16",
        "partial": "*bf16",
    }
    pointers |= dict.fromkeys(("counts", "order", "tiles", "num_tiles", "words", "scales"), "*i32")
    floats = ("global_scale", "routing_weights", "weights", "bias", "output_scale")
    pointers |= dict.fromkeys(floats, "*fp32")
    pointers |= {"logits": "*bf16", "table": "*i64", "expected": "*i64", "changed": "*i32"}
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


def variants():
    """(kernel, constants, warps, further) of each row of the tables, and of each activation."""
    from fp4moe.kernels.triton import (
        activation as triton_activation,
    )
    from fp4moe.kernels.triton import (
        choose as triton_choice,
    )
    from fp4moe.kernels.triton import (
        fingerprint as triton_fingerprint,
    )
    from fp4moe.kernels.triton import (
        gemm as triton_experts,
    )
    from fp4moe.kernels.triton import (
        sort as triton_routing,
    )
    from fp4moe.kernels.triton.tiles import MODES as NAMES

    def constants(tile, **more):
        names = {"SLOTS": tile.slots, "MORE": tile.more, "ROWS": tile.rows, "SLABS": tile.slabs}
        return {
            **names,
            "STAGES": tile.stages,
            "ASSEMBLY": True,
            "WAIT": False,
            **more,
        }, tile.warps

    configs = [(layer.gated, config) for layer in read(SHIPPED) for config in layer.tiles.values()]
    gate_ups = sorted({(gated, c.mode, str(c.gate_up)) for gated, c in configs})
    for number, (gated, mode, tile) in enumerate(gate_ups):
        # Whole steps and bfloat16, or neither.
        plain = number % 2 == 1
        form = {"GATED": gated, "WHOLE": not plain, "FP16": plain, "MODE": NAMES.index(mode)}
        form["ACTIVATION"] = "gelu_tanh" if gated else "relu2"
        gate_up = constants(Tile(*map(int, tile.split(","))), **form)
        yield triton_experts.gate_up_kernel, *gate_up, {"hidden": "*fp16" if plain else "*bf16"}
    for mode, tile in sorted({(c.mode, str(c.down)) for _, c in configs}):
        down = constants(Tile(*map(int, tile.split(","))), MODE=NAMES.index(mode), WHOLE=False)
        yield triton_experts.down_kernel, *down, {}
    for number, activation in enumerate(ACTIVATIONS):
        form = {"GATED": number % 2 == 0, "ACTIVATION": activation, "WHOLE": True, "FP16": False}
        small = constants(Tile(16, 64, 1, 4, 2), MODE=1, **form)
        yield triton_experts.gate_up_kernel, *small, {}
    sizes = {"EXPERTS": 256, "CHUNK": 128}
    yield triton_routing.sort_kernel, {**sizes, "SLOTS": 16, "CHUNK": 2048, "PADDED": 0}, 8, {}
    yield triton_routing.count_kernel, sizes, 4, {}
    yield triton_routing.scan_kernel, {"EXPERTS": 256, "BLOCK": 2}, 4, {}
    yield triton_routing.place_kernel, {**sizes, "SLOTS": 16, "PADDED": 0}, 4, {}
    padded = {"SLOTS": 48, "PADDED": 64}
    yield triton_routing.sort_kernel, {**sizes, **padded, "CHUNK": 1024}, 8, {}
    yield triton_routing.place_kernel, {**sizes, **padded}, 4, {}
    combine = {"LANES": 8, "COLUMNS": 1024, "WEIGHTED": False}
    yield triton_routing.combine_kernel, combine, 4, {}
    yield triton_routing.combine_kernel, combine | {"WEIGHTED": True}, 4, {}
    rows = {"GATED": True, "ACTIVATION": "silu", "COLUMNS": 1024}
    yield triton_activation.activate_kernel, rows, 4, {}
    choice = {"GROUPS": 8, "GROUP_EXPERTS": 32, "TOP_GROUPS": 4, "TOP_K": 8, "TOP_K_PADDED": 8}
    yield (
        triton_choice.choose_experts_kernel,
        choice | {"SIGMOID": True, "BIASED": True, "SCALED": False},
        1,
        {},
    )
    choice |= {"GROUPS": 1, "GROUP_EXPERTS": 128, "TOP_GROUPS": 0, "SIGMOID": False}
    choice |= {"SIGMOID": True, "BIASED": True, "SCALED": False}
    yield triton_choice.choose_experts_kernel, choice, 1, {}
    choice |= {"GROUPS": 1, "GROUP_EXPERTS": 128, "TOP_GROUPS": 0, "SIGMOID": False}
    yield triton_choice.choose_experts_kernel, choice | {"BIASED": False, "SCALED": True}, 1, {}
    names = ("SAMPLES", "WORDS", "SPREAD", "MULTIPLIER")
    yield triton_fingerprint.compare_kernel, {n: getattr(fingerprint, n) for n in names}, 4, {}


@compiled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_variant_compiles(capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function, constants, warps, further in variants():
        if "WAIT" in constants:
            constants = {**constants, "WAIT": capability == 90}
        types, attributes = signature(function, constants, **further)
        places = {(function.arg_names.index(n),): value for n, value in constants.items()}
        source = ASTSource(function, types, places, attributes)
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options={"num_warps": warps})
        label = (function.__name__, constants)
        assert kernel.asm["cubin"], label
        # No product stays in flight beyond its step: its registers would be written too early.
        assert not re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", kernel.asm["ptx"]), label
        # 86, 89 and 120 have 99 KiB of shared memory a block, the others 163 KiB and more.
        limit = (99 if capability in (86, 89, 120) else 163) * 1024
        assert kernel.metadata.shared <= limit, (label, kernel.metadata.shared)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 33, 300, 2100])
@pytest.mark.parametrize(("activation", "gated"), [("gelu_tanh", True), ("relu2", False)])
def test_on_the_gpu(activation, gated, tokens, dtype, poisoned_empty):
    weights = layer(9, 336, 208, activation, gated, device="cuda", num_experts=16, expert_offset=3)
    # Three roundings to bfloat16 at most, each below 2^-9.
    config = choose_tiles((9, 0), gated, 384, 256, 9, tokens * 5)
    compare(config, weights, dtype, tokens, 5, 3 * 2.0**-9, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*TILES, MODES["more"]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_config_on_the_gpu(activation, config):
    weights = layer(7, 256, 192, activation, True, device="cuda")
    compare(config, weights, torch.bfloat16, 37, 4, 3 * 2.0**-9, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("routing", "experts"), ROUTINGS, ids=str)
def test_the_choice_on_the_gpu(routing, experts, poisoned_empty):
    compare_choices(routing, experts, "cuda", 300)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 32, 128])
def test_equal_bits_at_the_width_of_nemotron(tokens):
    weights = layer(128, 2688, 1856, "relu2", False, "cuda")
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    hidden = torch.randn(tokens, 2688, device="cuda").bfloat16()
    ids = torch.rand(tokens, 128, device="cuda").topk(6).indices
    routing_weights = torch.rand(tokens, 6, device="cuda")
    call = prepared.call(hidden, ids, routing_weights)
    first = TRITON(call)
    assert all(torch.equal(TRITON(call), first) for _ in range(50))


@pytest.mark.gpu
def test_no_local_expert_gives_zeros(poisoned_empty):
    prepared = TRITON.prepare(layer(2, 64, 64, "silu", True, "cuda"), hidden_alignment=256)
    elsewhere = Layer("silu", True, 64, 64, 8, expert_offset=4)
    for tokens in (2, 100, 1000):
        x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(tokens, 3, dtype=torch.int32, device="cuda")
        out = TRITON(prepared.call(x, ids, ids.float())._replace(layer=elsewhere))
        assert torch.equal(out, torch.zeros_like(x))
