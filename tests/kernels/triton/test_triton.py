"""The Triton kernels: layout, routing, results in the interpreter and on a GPU.

The interpreter is chosen when triton is imported, so its cases, and those of test_fingerprint.py,
of the other files here that name it, run in a process of their own, with TRITON_INTERPRET=1; they
are skipped here and started by test_the_interpreter_agrees.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from triton_layers import (
    CUT,
    HAS_TRITON,
    INTERPRETED,
    MODES,
    VERSIONS,
    compare,
    compiled,
    interpreted,
    layer,
    needs_triton,
    relative,
)
from triton_ptx import run_ptx

from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import UnsupportedError
from fp4moe.formats.nvfp4 import NVFP4Values, dequantize_nvfp4
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.kernel import TRITON
from fp4moe.kernels.triton.layout import from_slabs, scales_from_slabs, scales_to_slabs, to_slabs
from fp4moe.layer import Layer, Routing
from fp4moe.ops import nvfp4_moe_from_logits_arguments
from fp4moe.reference import reference
from fp4moe.routing import route, softmax_topk

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
    with pytest.raises(UnsupportedError, match=r"^moe: kernel triton cannot run.* cpu \(a CPU\)"):
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


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.skipif(
    HAS_TRITON and VERSIONS["numpy"] >= (2, 4) and VERSIONS["triton"] < (3, 7),
    reason="needs triton 3.7 or numpy below 2.4: the interpreter of 3.6 reads arrays as scalars",
)
def test_the_interpreter_agrees():
    file = pathlib.Path(__file__)
    others = (
        file.with_name("test_triton_formats.py"),
        file.with_name("test_triton_linear.py"),
        file.with_name("test_triton_gradients.py"),
        file.with_name("test_triton_one_token.py"),
        file.with_name("test_triton_grouped.py"),
        file.with_name("test_triton_rows.py"),
        file.with_name("test_triton_w8a8.py"),
        file.with_name("test_triton_parameters.py"),
        file.parents[2] / "identity/test_fingerprint.py",
        file.parents[2] / "pretrained/test_linears_on_triton.py",
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
