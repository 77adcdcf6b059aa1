"""Two launches for one token: results, the choice, and what ptxas makes of them.

Cases of the interpreter run in a process that test_triton.py starts.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from triton_layers import (
    HAS_TRITON,
    INTERPRETED,
    compile_for,
    compiled,
    interpreted,
    layer,
    relative,
)

from fp4moe import FusedExperts
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import base
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.reference import reference

if HAS_TRITON:
    from fp4moe.kernels.triton.activation import activation_constants
    from fp4moe.kernels.triton.one_token import constants_of, run_one_token
if HAS_TRITON and not INTERPRETED:
    from fp4moe.kernels.triton import one_token_gemm

GPT_OSS = "silu(alpha=1.702,beta=1,limit=0.5)"
MEASURED = [row for row in read(SHIPPED) if row.one_token]
GATED, PLAIN = (row.one_token for row in MEASURED)
# The intermediate and the sum are cut to bfloat16 by the interpreter, 2^-8 each; a GPU rounds.
CUT = 2 * 2.0**-8
ROUNDED = CUT / 2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call_of(weights, ids, dtype, device="cpu"):
    # Small enough that the square of relu2 stays below float16's largest number.
    hidden = (torch.randn(1, weights.hidden_size, device=device) / 16).to(dtype)
    ids = torch.tensor([ids], device=device)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    return prepared.call(hidden, ids, torch.rand(ids.shape, device=device) + 0.5)


def check(tiles, weights, ids, dtype, limit, device="cpu"):
    call = call_of(weights, ids, dtype, device)
    got = run_one_token(tiles, call)
    expected = reference(call.hidden.float(), weights, call.expert_ids, call.routing_weights)
    assert got.dtype == dtype and got.shape == call.hidden.shape
    assert relative(got, expected) < limit
    return call, got


# tiles, activation, gated, biased, hidden, intermediate, ids of experts 2 to 4 of 8, dtype. A slab
# is 64 columns; which chunks are whole, shared by two slots or empty follows from their number.
SMALL = [
    (GATED, "gelu_tanh", True, False, 64, 48, [3], BF16),
    (GATED, GPT_OSS, True, True, 80, 100, [4, 2], FP32),
    (PLAIN, "relu2", False, False, 336, 64, [2, 9, 4], FP16),
    (PLAIN, "relu2", False, True, 64, 208, [4, -1, 2, 3, 1, 2], BF16),
    (GATED, "silu", True, False, 64, 64, [0, 3, 2, 4, 4, 5, 3, 2], BF16),
]
# Several groups a chunk, in gate and up, and in down across slots.
LONG = [
    (GATED, "silu_step(limit=0.2)", True, True, 850, 48, [3, 7], FP16),
    (PLAIN, "gelu", False, False, 64, 530, [2, 3, 4], FP32),
]


@interpreted
@pytest.mark.parametrize(
    ("tiles", "activation", "gated", "biased", "hidden", "intermediate", "ids", "dtype"),
    SMALL + LONG,
)
def test_small_layers(
    tiles, activation, gated, biased, hidden, intermediate, ids, dtype, poisoned_empty
):
    window = {"num_experts": 8, "expert_offset": 2, "biased": biased}
    weights = layer(3, hidden, intermediate, activation, gated, **window)
    call, got = check(tiles, weights, ids, dtype, CUT)
    if len(ids) == 2:
        assert torch.equal(run_one_token(tiles, call), got)


@interpreted
def test_no_local_expert_gives_zeros(poisoned_empty):
    weights = layer(2, 64, 64, "silu", True, num_experts=8, expert_offset=2, biased=True)
    got = run_one_token(GATED, call_of(weights, [0, -1, 4], BF16))
    assert torch.equal(got, torch.zeros_like(got))


@interpreted
def test_biases_by_hand(poisoned_empty):
    # down sums 64 columns of min(3, 2) * (-1.5 + 1) = -1, all of it exact.
    weights = layer(1, 64, 64, "relu(beta=1,limit=2)", True, biased=True)
    zeros, ones = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)
    down_bias = torch.arange(64.0)[None]
    weights = type(weights).quantize(
        up=zeros, gate=zeros, down=ones, activation=weights.activation, down_bias=down_bias,
        up_bias=torch.full((1, 64), -1.5), gate_bias=torch.full((1, 64), 3.0),
    )  # fmt: skip
    call = call_of(weights, [0, -1, 0], FP32)
    call = call._replace(routing_weights=torch.tensor([[0.5, 9, 0.25]]))
    assert torch.equal(run_one_token(GATED, call), 0.75 * (down_bias - 64))


@interpreted
def test_a_nan_passes():
    call = call_of(layer(2, 64, 64, "silu", True), [1, 0], BF16)
    call.hidden[0, 7] = torch.nan
    assert run_one_token(GATED, call).isnan().all()


@interpreted
def test_auto_takes_it_for_one_token_on_hopper(monkeypatch):
    weights = layer(2, 64, 64, "silu", True)
    call = call_of(weights, [1, 0], BF16)
    slot = run_with(choose_tiles((9, 0), True, 64, 64, 2, 2), call)
    # They round each slot's output, too.
    assert not torch.equal(run_one_token(GATED, call), slot)
    assert torch.equal(TRITON(call), slot)
    monkeypatch.setattr(base, "query_capability", lambda device: (9, 0))
    assert torch.equal(TRITON(call), run_one_token(GATED, call))
    # Gate and up are computed again with tiles of many slots.
    gradient = torch.randn_like(call.hidden)
    got = TRITON.gradients(call, gradient)
    monkeypatch.setattr(base, "query_capability", lambda device: (8, 0))
    assert torch.equal(TRITON(call), slot)
    assert all(map(torch.equal, got, TRITON.gradients(call, gradient)))
    monkeypatch.setattr(base, "query_capability", lambda device: (9, 0))
    two = call._replace(
        hidden=call.hidden.repeat(2, 1), expert_ids=call.expert_ids.repeat(2, 1),
        routing_weights=call.routing_weights.repeat(2, 1),
    )  # fmt: skip
    assert torch.equal(TRITON(two), slot.repeat(2, 1))


@pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
@pytest.mark.parametrize(
    ("tokens", "top_k", "format"), [(2, 2, "nvfp4"), (1, 9, "nvfp4"), (1, 2, "mxfp4")]
)
def test_what_it_cannot_run_is_refused(tokens, top_k, format):
    prepared = TRITON.prepare(layer(2, 64, 64, "silu", True, format=format), hidden_alignment=256)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    call = prepared.call(torch.zeros(tokens, 64), ids, ids + 1.0)
    with pytest.raises(UnsupportedError, match=r"^moe: tiles 16,3,4 32,3,8 cannot run"):
        run_one_token(GATED, call)


def variants():
    """(kernel, constants, warps, further, loads of words) of what is shipped, and with the rest."""
    for row in MEASURED:
        hidden, intermediate, tiles = (
            -(-row.hidden_size // 64),
            row.intermediate_size,
            row.one_token,
        )
        for odd in (False, True):
            gate_up = {"INTERMEDIATE": intermediate, "SLABS": hidden, "GATED": row.gated}
            gate_up |= activation_constants("gelu_tanh" if row.gated else "relu2")
            gate_up |= {"WHOLE": not odd, "FP16": odd, **({} if odd else {"bias": None})}
            down = {"TOP_K": row.top_k, "HIDDEN_PADDED": hidden * 64, "SLABS": intermediate // 64}
            down |= {} if odd else {"bias": None}
            further = {"hidden": "*fp16" if odd else "*bf16"}
            for kernel, tile, parts, constants in (
                (one_token_gemm.one_token_gate_up_kernel, tiles.gate_up, 1 + row.gated, gate_up),
                (one_token_gemm.one_token_down_kernel, tiles.down, 1, down),
            ):
                constants |= constants_of(tile, parts)
                warps = constants.pop("num_warps")
                yield kernel, constants, warps, further


@pytest.mark.slow
@compiled
def test_every_variant_compiles(tmp_path, monkeypatch):
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function, constants, warps, further in variants():
        kernel = compile_for(90, function, constants, warps, further)
        label, ptx = (function.__name__, constants), kernel.asm["ptx"]
        slots = constants.get("TOP_K", 1)
        units = -(-slots * constants["SLABS"] // constants["CHUNKS"])
        # A thread has two rows of 16 of each tile, and two words of each, loaded at once.
        assert ptx.count("ld.global.v2.b32") == units * constants["TILES"] * 2, label
        whole = -(-units // constants["GROUP"]) * constants["GROUP"]
        assert ptx.count("mma.sync") == whole * constants["TILES"] * 4, label
        down = "TOP_K" in constants
        assert ptx.count("griddepcontrol.wait") == down, label
        assert ptx.count("griddepcontrol.launch_dependents") == (not down), label
        if down:
            # Until it waits it reads ids and weights alone, and writes nothing.
            before = ptx.partition("griddepcontrol.wait")[0]
            assert "st.global" not in before and "mma.sync" not in before, label
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        used = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        )
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", used.stdout + used.stderr))
        assert usage["STACK"] == usage["LOCAL"] == "0", (label, usage)
        # Three programs of gate and up a multiprocessor, one of down.
        assert int(usage["REG"]) <= (255 if down else 65536 // (3 * 32 * warps)), (label, usage)


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("case", [*SMALL, *LONG], ids=str)
def test_on_the_gpu(case, dtype, poisoned_empty, hopper):
    tiles, activation, gated, biased, hidden, intermediate, ids, _ = case
    window = {"num_experts": 8, "expert_offset": 2, "biased": biased}
    weights = layer(3, hidden, intermediate, activation, gated, "cuda", **window)
    call, got = check(tiles, weights, ids, dtype, ROUNDED, "cuda")
    assert all(torch.equal(run_one_token(tiles, call), got) for _ in range(20))


def full_size(row):
    """FusedExperts of a measured layer, and a function of a seed that gives inputs."""
    activation = "gelu_tanh" if row.gated else "relu2"
    sizes = (row.hidden_size, row.intermediate_size)
    weights = layer(32, *sizes, activation, row.gated, "cuda")
    experts = FusedExperts(weights, kernel="triton", top_k=row.top_k)

    def inputs(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        noise = torch.rand(1, 32, device="cuda", generator=generator)
        hidden = torch.randn(1, row.hidden_size, device="cuda", generator=generator).bfloat16()
        return hidden, noise.topk(row.top_k).indices, noise[:, : row.top_k].contiguous()

    return weights, experts, inputs


SEEDS = range(8)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("row", MEASURED, ids=lambda row: str(row.one_token))
def test_eager_graphs_compiled_and_streams_agree(row, hopper, fresh_dynamo):
    weights, experts, inputs = full_size(row)
    given = [inputs(seed) for seed in SEEDS]
    expected = []
    for each in given:
        expected.append(experts(*each))
        torch.cuda.synchronize()
        assert relative(expected[-1], reference(each[0].float(), weights, *each[1:])) < ROUNDED
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        experts(*given[0])
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages() if "kernel" in event.key}
    assert names == {"one_token_gate_up_kernel", "one_token_down_kernel"}

    # Nothing between the calls: the next one's workspace is the memory of the one before.
    for _ in range(20):
        got = [experts(*each) for each in given]
        assert all(map(torch.equal, got, expected))

    # One graph, replayed with other ids, weights and hidden at the same addresses, twice in it.
    static = [t.clone() for t in given[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = experts(*static)
        second = experts(first, *static[1:])
    for each in given * 3:
        for old, new in zip(static, each, strict=True):
            old.copy_(new)
        graph.replay()
        twice = experts(experts(*each), *each[1:])
        assert torch.equal(first, experts(*each)) and torch.equal(second, twice)

    for mode in ("default", "reduce-overhead"):
        module = torch.compile(lambda *args: experts(*args) + 0, fullgraph=True, mode=mode)
        for each, want in zip(given * 2, expected * 2, strict=True):
            assert torch.equal(module(*each), want)

    streams = [torch.cuda.Stream() for _ in SEEDS]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(experts(*each))
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, expected))
