"""Ahead-of-time compilation of the Triton kernels for every target, without a GPU."""

from __future__ import annotations

import itertools

import pytest
from triton_layers import HAS_TRITON, INTERPRETED, check_variants, compile_for, compiled

from fp4moe.activations import ACTIVATIONS
from fp4moe.identity import fingerprint as identity
from fp4moe.kernels.measured import SHIPPED, read
from fp4moe.kernels.triton.tiles import MODES, Tile

# Every variant for each instruction of products, and for the least shared memory: 86. What shares
# both with it, 89 and 120, or the instruction, 80, takes a third of the variants each.
TARGETS = {80: (0, 3), 86: (0, 1), 89: (1, 3), 90: (0, 1), 100: (0, 1), 120: (2, 3)}
PARAMETERS = (
    "silu(alpha=1.702,beta=1,limit=7)",
    "silu_step(limit=7)",
    "silu_softcap(alpha=4,beta=25)",
)

if HAS_TRITON and not INTERPRETED:
    # Here, since a kernel sees the names of its module alone.
    import triton
    import triton.language as tl

    from fp4moe.kernels.triton import activation, choose, fingerprint, gemm, sort

    @triton.jit(do_not_specialize=["expert_offset"])
    def plain_rows(
        gate_up, ids, bias, out, columns, expert_offset, local_experts, COLUMNS: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < columns
        first = gate_up + row * columns * 2
        gate = tl.load(first + column, mask=mask, other=0).to(tl.float32)
        up = tl.load(first + columns + column, mask=mask, other=0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up
        tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)


def variants():
    """(kernel, constants, warps, further) of each row of the tables, and of each activation."""

    def constants(tile, **more):
        names = {"SLOTS": tile.slots, "MORE": tile.more, "ROWS": tile.rows, "SLABS": tile.slabs}
        further = {"STAGES": tile.stages, "ASSEMBLY": True, "WAIT": False, "FORMAT": "nvfp4"}
        return {**names, **further, **more}, tile.warps

    def tile(text):
        return Tile(*map(int, text.split(",")))

    plain, unbiased = activation.activation_constants, {"bias": None}
    configs = [(layer.gated, config) for layer in read(SHIPPED) for config in layer.tiles.values()]
    gate_ups = sorted({(gated, c.mode, str(c.gate_up)) for gated, c in configs})
    downs = sorted({(c.mode, str(c.down)) for _, c in configs})
    for number, (gated, mode, text) in enumerate(gate_ups):
        # Whole steps and bfloat16, or neither.
        odd = number % 2 == 1
        form = {"GATED": gated, "WHOLE": not odd, "FP16": odd, "MODE": MODES.index(mode)}
        form |= plain("gelu_tanh" if gated else "relu2") | unbiased
        further = {"hidden": "*fp16" if odd else "*bf16"}
        yield gemm.gate_up_kernel, *constants(tile(text), **form), further
    for mode, text in downs:
        form = {"MODE": MODES.index(mode), "WHOLE": False}
        yield gemm.down_kernel, *constants(tile(text), **form, **unbiased), {}
    for number, name in enumerate(ACTIVATIONS):
        form = {"GATED": number % 2 == 0, "WHOLE": True, "FP16": False, "MODE": 1}
        small = constants(Tile(16, 64, 1, 4, 2), **form, **plain(name), **unbiased)
        yield gemm.gate_up_kernel, *small, {}
    # With biases and parameters: the largest tile, and the one of few slots.
    for number, name in enumerate((*PARAMETERS, "relu2")):
        gated = name != "relu2"
        form = {"GATED": gated, "WHOLE": number % 2 == 0, "FP16": False, **plain(name)}
        for mode in MODES[number % 2 :: 2]:
            texts = [text for *kind, text in gate_ups if kind == [gated, mode]]
            most = constants(max(map(tile, texts), key=size), **form, MODE=MODES.index(mode))
            yield gemm.gate_up_kernel, *most, {}
    for mode in MODES:
        most = max((tile(text) for kind, text in downs if kind == mode), key=size)
        yield gemm.down_kernel, *constants(most, MODE=MODES.index(mode), WHOLE=True), {}
    sizes = {"EXPERTS": 256, "CHUNK": 128}
    yield sort.sort_kernel, {**sizes, "SLOTS": 16, "CHUNK": 2048, "PADDED": 0}, 8, {}
    yield sort.count_kernel, sizes, 4, {}
    yield sort.scan_kernel, {"EXPERTS": 256, "BLOCK": 2}, 4, {}
    yield sort.place_kernel, {**sizes, "SLOTS": 16, "PADDED": 0}, 4, {}
    padded = {"SLOTS": 48, "PADDED": 64}
    yield sort.sort_kernel, {**sizes, **padded, "CHUNK": 1024}, 8, {}
    yield sort.place_kernel, {**sizes, **padded}, 4, {}
    combine = {"LANES": 8, "COLUMNS": 1024, "WEIGHTED": False, "bias": None, "stride_bias": None}
    yield sort.combine_kernel, combine, 4, {}
    yield sort.combine_kernel, combine | {"WEIGHTED": True}, 4, {}
    yield sort.combine_kernel, {"LANES": 8, "COLUMNS": 1024, "WEIGHTED": True}, 4, {}
    rows = {"GATED": True, "COLUMNS": 1024}
    yield activation.activate_kernel, rows | plain("silu") | unbiased | {"ids": None}, 4, {}
    yield activation.activate_kernel, rows | plain(PARAMETERS[0]), 4, {}
    choice = {"GROUPS": 8, "GROUP_EXPERTS": 32, "TOP_GROUPS": 4, "TOP_K": 8, "TOP_K_PADDED": 8}
    yield (
        choose.choose_experts_kernel,
        choice | {"SIGMOID": True, "BIASED": True, "SCALED": False},
        1,
        {},
    )
    choice |= {"GROUPS": 1, "GROUP_EXPERTS": 128, "TOP_GROUPS": 0, "SIGMOID": False}
    yield choose.choose_experts_kernel, choice | {"BIASED": False, "SCALED": True}, 1, {}
    names = ("SAMPLES", "WORDS", "SPREAD", "MULTIPLIER")
    yield fingerprint.compare_kernel, {n: getattr(identity, n) for n in names}, 4, {}


def size(tile):
    return tile.rows * (tile.slots + tile.more)


@compiled
@pytest.mark.parametrize(
    "capability", [pytest.param(t, marks=() if t == 90 else pytest.mark.slow) for t in TARGETS]
)
def test_every_variant_compiles(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first, step = TARGETS[capability]
    check_variants(itertools.islice(variants(), first, None, step), capability)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_a_plain_activation_compiles_to_its_formula_alone(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    nothing = {"ids": None, "bias": None, "COLUMNS": 1024}
    form = {"GATED": True, **activation.activation_constants("silu"), **nothing}
    texts = []
    for function, constants in ((activation.activate_kernel, form), (plain_rows, nothing)):
        ptx = compile_for(capability, function, constants, 4, {}).asm["ptx"]
        texts.append(ptx[ptx.index(".visible") :].replace(function.__name__, "kernel"))
    assert "ex2.approx" in texts[0]
    assert texts[0] == texts[1]


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["gate_up_kernel", "down_kernel"])
def test_a_bias_is_a_parameter_only_where_there_is_one(name, biased, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(gemm, name)
    found = next(
        (constants, warps, further)
        for kernel, constants, warps, further in variants()
        if kernel is function and ("bias" not in constants) == biased
    )
    ptx = compile_for(80, function, *found).asm["ptx"]
    words = len([n for n in function.arg_names if n not in found[0] and n != "bias"])
    entry = ptx[ptx.index(".entry") :].partition(")")[0]
    # Triton adds two of its own, for scratch and for profiling.
    assert entry.count(".param") == words + biased + 2
