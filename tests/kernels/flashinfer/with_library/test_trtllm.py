"""Kernel `flashinfer_trtllm` on the installed FlashInfer, with the GPU's part emulated.

Each call is bound to the real signature and checked against the contract (conftest.py), then an
emulator that undoes the documented layout on its own computes; its result is compared with
`reference_w4a4` on the same quantised values.

Limit: both compute in float32, in another order, so that a value next to a tie of the E2M1 grid
may take the other code. LIMIT allows that for about one intermediate value in 10^4, at a step of up
to a third of its size, beside the rounding of outputs (2^-9).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest
import torch
from flashinfer_contract import installed_features, takes
from fused_layers import LAYER, layer, tokens

from fp4moe import ExpertWeights, FusedExperts, fused_moe, why_not
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import PreparedWeights, Routing, get_kernel
from fp4moe.kernels.flashinfer import library as library_module
from fp4moe.kernels.flashinfer.library import library, set_flashinfer
from fp4moe.kernels.flashinfer.trtllm import packed_routing, tokens_per_launch
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments
from fp4moe.reference import reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

OP = torch.ops.fp4moe.nvfp4_moe.default
OP_FROM_LOGITS = torch.ops.fp4moe.nvfp4_moe_from_logits.default
TRTLLM = get_kernel("flashinfer_trtllm")
LIMIT = 4e-3
ROUTED, FROM_LOGITS = "trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"


def prepared_arguments(weights, hidden_alignment=256):
    return nvfp4_moe_arguments(
        TRTLLM.prepare(weights, hidden_alignment=hidden_alignment), TRTLLM.name
    )


def expected(hidden, weights, ids, routing_weights) -> torch.Tensor:
    """reference_w4a4 with the routing weights that the installed library can take."""
    if not library().float32_weights:
        routing_weights = routing_weights.bfloat16()
    return reference_w4a4(hidden, weights, ids, routing_weights.float())


FORMS = [("silu", True), ("gelu_tanh", True), ("relu2", False)]
SIZES = [(256, 192), (128, 64), (384, 176), (256, 352), (128, 928), (272, 40), (130, 100)]


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


@pytest.mark.slow
@pytest.mark.parametrize("hidden_alignment", [128, 256, 512])
@pytest.mark.parametrize("hidden, intermediate", SIZES)
@pytest.mark.parametrize("activation, gated", FORMS)
def test_numbers(emulated, activation, gated, hidden, intermediate, hidden_alignment):
    weights = layer(hidden, intermediate, activation=activation, gated=gated)
    x, ids, routing = tokens(5, weights)
    got = OP(x, ids, routing, *prepared_arguments(weights, hidden_alignment))
    want = expected(x, weights, ids, routing)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert relative_error(got, want) < LIMIT
    (call,) = emulated.of(ROUTED)
    assert call["hidden_states"].shape[1] * 2 % hidden_alignment == 0


# Gemma4-26B-A4B, and Nemotron-3-Nano at the three hidden sizes: real widths, few experts.
@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden, intermediate, form, hidden_alignment",
    [(2816, 704, FORMS[1], 256)] + [(2688, 1856, FORMS[2], a) for a in (128, 256, 512)],
)
def test_real_widths(emulated, hidden, intermediate, form, hidden_alignment):
    weights = layer(hidden, intermediate, 3, *form)
    x, ids, routing = tokens(3, weights)
    got = OP(x, ids, routing, *prepared_arguments(weights, hidden_alignment))
    assert relative_error(got, expected(x, weights, ids, routing)) < LIMIT
    (call,) = emulated.of(ROUTED)
    assert call["output"].shape[1] == hidden  # the library drops the padding itself
    assert call["intermediate_size"] == {704: 704, 1856: 1920}[intermediate]


@pytest.mark.parametrize("count", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tokens_and_dtypes(emulated, count, dtype):
    weights = layer()
    x, ids, routing = tokens(count, weights, dtype=dtype)
    got = OP(x, ids.int(), routing.to(dtype), *prepared_arguments(weights))
    assert got.dtype == dtype
    assert relative_error(got, expected(x, weights, ids, routing.to(dtype))) < LIMIT


def test_no_token_and_no_expert_return_before_the_library(emulated):
    weights = layer()
    x, ids, routing = tokens(3, weights)
    arguments = prepared_arguments(weights)
    assert OP(x[:0], ids[:0], routing[:0], *arguments).shape == (0, weights.hidden_size)
    assert OP(x, ids[:, :0], routing[:, :0], *arguments).eq(0).all()
    logits, bias = torch.randn(0, 4), torch.empty(0)
    prepared = TRTLLM.prepare(weights, hidden_alignment=256)
    extra = nvfp4_moe_from_logits_arguments(prepared, Routing("softmax_topk", 2), TRTLLM.name)
    assert OP_FROM_LOGITS(x[:0], logits, bias, *extra).shape == (0, weights.hidden_size)
    assert emulated.calls == []


def test_strided_arguments(emulated):
    """A row with a stride of 1 is contiguous to torch, and transposed to the quantiser."""
    weights = layer()
    x, ids, routing = tokens(1, weights)
    want = OP(x, ids, routing, *prepared_arguments(weights))
    turned = x.as_strided(x.shape, (1, 1))
    assert turned.is_contiguous()
    assert torch.equal(OP(turned, ids, routing, *prepared_arguments(weights)), want)
    x, ids, routing = tokens(6, weights)
    want = OP(x, ids, routing, *prepared_arguments(weights))
    turned = [t.T.contiguous().T for t in (x, ids, routing)]
    assert torch.equal(OP(*turned, *prepared_arguments(weights)), want)


def test_ids_outside_the_window_contribute_nothing(emulated):
    weights = layer(num_experts=7, expert_offset=2)
    x, ids, routing = tokens(9, weights, top_k=3)
    ids[0] = torch.tensor([-1, 7, 0])
    ids[1, 0] = 7
    got = OP(x, ids, routing, *prepared_arguments(weights))
    assert got[0].eq(0).all()
    assert relative_error(got, expected(x, weights, ids, routing)) < LIMIT
    (call,) = emulated.of(ROUTED)
    assert set(call["topk_ids"][0].unique().tolist()) <= {-1, 2, 3, 4, 5}
    assert (call["local_expert_offset"], call["local_num_experts"], call["num_experts"]) == (
        2,
        4,
        7,
    )


def test_expert_and_tensor_shards_sum_to_the_whole(emulated):
    weights = layer(256, 704, activation="gelu_tanh")
    x, ids, routing = tokens(6, weights, dtype=torch.float32)
    whole = OP(x, ids, routing, *prepared_arguments(weights))
    halves = [weights.slice_experts(0, 1), weights.slice_experts(1, 4)]
    parts = [OP(x, ids, routing, *prepared_arguments(part)) for part in halves]
    # Each part is rounded to bfloat16 once more.
    assert relative_error(sum(parts), whole) < 2**-8
    # TP 4 of Gemma4: 176 rows a shard, padded to 192 in each half on its own.
    quarters = [weights.slice_intermediate(i * 176, i * 176 + 176) for i in range(4)]
    parts = [OP(x, ids, routing, *prepared_arguments(part)) for part in quarters]
    assert relative_error(sum(parts), whole) < 2**-8


@pytest.mark.parametrize("activation, gated", FORMS)
@pytest.mark.parametrize("hidden_alignment", [128, 512])
def test_restore_is_exact(activation, gated, hidden_alignment):
    weights = layer(272, 40, activation=activation, gated=gated, num_experts=9, expert_offset=3)
    prepared = TRTLLM.prepare(weights, hidden_alignment=hidden_alignment)
    back = TRTLLM.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        same = back.tensors()[name]
        assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8)), name


def test_scale_operands_by_hand():
    """s_x = 2, s_up = 3, s_a = 4, s_down = 5: the table of the library's contract."""
    for gated, first in ((True, 3 * 2 / 4), (False, 1 / 4)):
        weights = layer(128, 128, 1, "silu" if gated else "relu2", gated)
        weights = dataclasses.replace(
            weights,
            gate_up=dataclasses.replace(weights.gate_up, global_scale=torch.tensor([3.0])),
            down=dataclasses.replace(weights.down, global_scale=torch.tensor([5.0])),
            hidden_scale=torch.tensor([2.0]),
            intermediate_scale=torch.tensor([4.0]),
        )
        operands = TRTLLM.prepare(weights, hidden_alignment=128).operands
        assert operands.gate_up_global_scale.tolist() == [6.0]  # output1_scale_gate_scalar
        assert operands.intermediate_scale.tolist() == [first]  # output1_scale_scalar
        assert operands.down_global_scale.tolist() == [4.0 * 5]  # output2_scale_scalar
        assert operands.hidden_scale.tolist() == [0.5]


# What the emulator must not forgive.


def swapped(p: PreparedWeights, weights: ExpertWeights) -> PreparedWeights:
    def swap(t: torch.Tensor) -> torch.Tensor:
        return torch.cat(t.chunk(2, 1)[::-1], 1)

    gate_up = dataclasses.replace(
        weights.gate_up,
        packed=swap(weights.gate_up.packed),
        block_scale=swap(weights.gate_up.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn),
    )
    return TRTLLM.prepare(dataclasses.replace(weights, gate_up=gate_up), hidden_alignment=128)


def unshuffled(p: PreparedWeights, weights: ExpertWeights) -> PreparedWeights:
    operands = p.operands._replace(down_packed=weights.down.packed.contiguous())
    return dataclasses.replace(p, operands=operands)


def linear_scales(p: PreparedWeights, weights: ExpertWeights) -> PreparedWeights:
    scale = weights.gate_up.block_scale.view(torch.uint8).contiguous()
    return dataclasses.replace(p, operands=p.operands._replace(gate_up_block_scale=scale))


def inverted(name: str):
    def break_scale(p: PreparedWeights, weights: ExpertWeights) -> PreparedWeights:
        scale = getattr(p.operands, name)
        operands = p.operands._replace(**{name: scale.reciprocal() * scale.mean() ** 2})
        return dataclasses.replace(p, operands=operands)

    return break_scale


def padding_with_values(p: PreparedWeights, weights: ExpertWeights) -> PreparedWeights:
    full = weights.padded(intermediate_multiple=128)
    first = full.gate_up.packed.clone().unflatten(1, (2, -1))
    first[:, :, weights.intermediate_padded :] = 0x77
    scale = full.gate_up.block_scale.clone().view(torch.uint8).unflatten(1, (2, -1))
    scale[:, :, weights.intermediate_padded :] = 0x7E
    second, second_scale = full.down.packed.clone(), full.down.block_scale.clone().view(torch.uint8)
    second[..., weights.intermediate_padded // 2 :] = 0x77
    second_scale[..., weights.intermediate_padded // 16 :] = 0x7E
    e4m3 = torch.float8_e4m3fn
    broken = dataclasses.replace(
        full,
        intermediate_size=full.intermediate_padded,
        gate_up=dataclasses.replace(
            full.gate_up, packed=first.flatten(1, 2), block_scale=scale.flatten(1, 2).view(e4m3)
        ),
        down=dataclasses.replace(full.down, packed=second, block_scale=second_scale.view(e4m3)),
    )
    return TRTLLM.prepare(broken, hidden_alignment=128)


BREAKS = {
    "gate and up swapped": swapped,
    "no row shuffle": unshuffled,
    "linear block scales": linear_scales,
    "output1_scale_gate_scalar": inverted("gate_up_global_scale"),
    "output1_scale_scalar": inverted("intermediate_scale"),
    "output2_scale_scalar": inverted("down_global_scale"),
    "padding that is not zero": padding_with_values,
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_preparation_shows(emulated, name):
    weights = layer(256, 64)
    x, ids, routing = tokens(5, weights)
    sound = TRTLLM.prepare(weights, hidden_alignment=128)
    want = expected(x, weights, ids, routing)
    assert (
        relative_error(OP(x, ids, routing, *nvfp4_moe_arguments(sound, TRTLLM.name)), want) < LIMIT
    )
    broken = BREAKS[name](sound, weights)
    got = OP(x, ids, routing, *nvfp4_moe_arguments(broken, TRTLLM.name))
    assert relative_error(got, want) > 10 * LIMIT


# Calls.


@pytest.mark.parametrize(
    "activation, gated, name",
    [(*FORMS[0], "Swiglu"), (*FORMS[1], "Geglu"), ("gelu", True, "Geglu"), (*FORMS[2], "Relu2")],
)
def test_activations_go_by_the_librarys_names(emulated, activation, gated, name):
    emulated.activation = name
    weights = layer(activation=activation, gated=gated)
    OP(*tokens(2, weights), *prepared_arguments(weights))
    assert len(emulated.of(ROUTED)) == 1


def test_routing_weights_have_the_dtype_that_the_library_reads(emulated):
    weights = layer()
    x, ids, routing = tokens(2, weights)
    OP(x, ids, routing.double().float(), *prepared_arguments(weights))
    (call,) = emulated.of(ROUTED)
    dtype = torch.float32 if library().float32_weights else torch.bfloat16
    assert call["topk_ids"][1].dtype == dtype
    # 0.6.16 could read float32 already.
    assert installed_features().float32_routing_weights >= library().float32_weights
    layout = "hidden_states_scale_layout"
    assert (layout in call) == takes(ROUTED, layout)


def test_settings_reach_the_call(emulated):
    weights = layer()
    previous = set_flashinfer(enable_pdl=True, tune_max_num_tokens=64)
    try:
        emulated.tune_max_num_tokens = 64
        OP(*tokens(2, weights), *prepared_arguments(weights))
    finally:
        set_flashinfer(**dataclasses.asdict(previous))
    (call,), (quantise,) = emulated.of(ROUTED), emulated.of("fp4_quantize")
    assert call["enable_pdl"] is True and quantise["enable_pdl"] is True
    for wrong in (0, 3, 1.5, None):
        with pytest.raises(UnsupportedError, match=r"^set_flashinfer: tune_max_num_tokens must be"):
            set_flashinfer(tune_max_num_tokens=wrong)
    with pytest.raises(UnsupportedError, match=r"^set_flashinfer: enable_pdl must be None, True"):
        set_flashinfer(enable_pdl="yes")


def test_settings_reach_a_call_whose_kernel_was_chosen_before(emulated):
    weights = layer()
    x, ids, routing = tokens(2, weights)
    fused_moe(x, weights, ids, routing)
    previous = set_flashinfer(enable_pdl=True)
    try:
        fused_moe(x, weights, ids, routing)
    finally:
        set_flashinfer(**dataclasses.asdict(previous))
    assert [call["enable_pdl"] for call in emulated.of(ROUTED)] == [None, True]


def test_many_tokens_are_launched_in_parts(emulated, monkeypatch):
    from fp4moe.kernels.flashinfer import trtllm as flashinfer_trtllm

    weights = layer()
    x, ids, routing = tokens(11, weights)
    want = OP(x, ids, routing, *prepared_arguments(weights))
    monkeypatch.setattr(flashinfer_trtllm, "MOST_TOKENS", 4)
    assert torch.equal(OP(x, ids, routing, *prepared_arguments(weights)), want)
    sizes = [call["hidden_states"].shape[0] for call in emulated.of(ROUTED)]
    assert sizes == [11, 4, 4, 3]
    monkeypatch.undo()
    # Each expert adds at most one tile that is not full.
    for experts, top_k in ((128, 8), (512, 22), (8, 1), (2048, 32)):
        most = tokens_per_launch(experts, top_k)
        assert most * top_k / 64 + experts <= 65535 and most >= 100_000


def test_packed_routing():
    ids = torch.tensor([[3, -1, 511]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 1.0, 2.5]])
    packed = packed_routing(ids, weights)
    assert torch.equal(packed >> 16, ids)
    assert torch.equal((packed << 16).view(torch.float32), weights)


# Routing in the kernel.

ROUTINGS = {
    "Gemma4": (Routing("softmax_topk", 3), 0),
    "NemotronH": (Routing("sigmoid_topk", 3, scaling=2.5), 8),
    "no bias": (Routing("sigmoid_topk", 2), 0),
    "groups": (Routing("sigmoid_topk", 3, num_groups=4, top_groups=2, scaling=1.5), 8),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_fused_routing_is_given_routing(emulated, name):
    routing, biased = ROUTINGS[name]
    weights = layer(experts=8, activation="gelu_tanh")
    output_scale = torch.linspace(0.5, 1.5, 8)
    x, _, _ = tokens(9, weights)
    # Distinct bfloat16 numbers: neither ties nor the rounding of a bias choose.
    logits = torch.stack([torch.randperm(8) for _ in range(9)]).float() / 2 - 2
    bias = torch.linspace(-0.05, 0.05, biased).bfloat16().float()
    prepared = TRTLLM.prepare(weights, hidden_alignment=256)
    # A factor per expert, as the pass hands it to packed weights.
    scaled = {"down_global_scale": prepared.operands.down_global_scale * output_scale}
    prepared = prepared.replaced({**prepared.tensors(), **scaled})
    arguments = nvfp4_moe_from_logits_arguments(prepared, routing, TRTLLM.name)
    got = OP_FROM_LOGITS(x, logits, bias, *arguments)
    ids, routing_weights = route(logits, bias, routing)
    want = reference_w4a4(x, weights, ids, routing_weights * output_scale[ids])
    assert relative_error(got, want) < LIMIT
    (call,) = emulated.of(FROM_LOGITS)
    method = "RenormalizeNaive" if routing.method == "softmax_topk" else "DeepSeekV3"
    assert call["routing_method_type"] == library().routing_method(method)


@pytest.mark.parametrize(
    "routing, experts, text",
    [
        (Routing("softmax_topk", 33), 128, "top_k"),
        (Routing("softmax_topk", 2, scaling=2.0), 128, "has no scaling factor, got 2.0"),
        (Routing("sigmoid_topk", 8, num_groups=16, top_groups=4), 512, "group"),
    ],
)
def test_what_the_library_cannot_route(routing, experts, text):
    from fp4moe.kernels import Layer

    shape = Layer("silu", True, 256, 192, experts, routing.top_k)
    reasons = TRTLLM.reasons_not_to_route(shape, routing)
    assert any(text in reason for reason in reasons), reasons
    assert TRTLLM.reasons_not_to_route(shape, Routing("softmax_topk", 8)) == []


# Refusals.


@pytest.mark.slow
@pytest.mark.parametrize(
    "epilogue, activation, gated",
    [("swiglu", *FORMS[0]), ("geglu", *FORMS[1]), ("relu2", *FORMS[2])],
)
def test_why_not_agrees_with_the_manifest(epilogue, activation, gated):
    """At exactly a row's size it says no where the row has no tile, and names one that has some."""
    data = json.loads(
        (pathlib.Path(__file__).parents[3] / "data/trtllm_gen_kernels.json").read_text()
    )
    tiles = {
        (row["hidden_size"], row["intermediate_size"]): row["tiles"]
        for row in data["rows"]
        if (row["format"], row["activation"]) == ("nvfp4", epilogue)
    }
    assert len(tiles) > 690
    for (hidden, intermediate), found in tiles.items():
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
        form = LAYER | {"activation": activation, "gated": gated} | sizes
        reasons = why_not("flashinfer_trtllm", **form, padded=False)
        assert why_not("flashinfer_trtllm", **form) == [] and bool(reasons) != bool(found), sizes
        for reason in reasons:
            named = re.search(r"the next size with one is (\d+) x (\d+)", reason)
            other = tuple(map(int, named.groups()))
            assert tiles.get(other) != [] and other >= (hidden, 1), reason


def test_why_not():
    assert why_not("flashinfer_trtllm", **LAYER) == []
    assert why_not("flashinfer_trtllm", **LAYER, padded=False) == []
    assert why_not("flashinfer_trtllm", **LAYER | {"capability": (10, 3)}) == []
    assert why_not("flashinfer_trtllm", **LAYER | {"capability": (9, 0)}) == [
        "needs compute capability 10.0 or 10.3, got 9.0"
    ]
    odd = LAYER | {"activation": "relu2", "gated": False, "intermediate_size": 1856}
    assert why_not("flashinfer_trtllm", **odd) == []
    (reason,) = why_not("flashinfer_trtllm", **odd, padded=False)
    assert "1856" in reason and "1920" in reason
    (reason,) = why_not("flashinfer_trtllm", **LAYER | {"activation": "relu2"})
    assert "relu2" in reason and "silu" in reason
    (reason,) = why_not("flashinfer_trtllm", **LAYER | {"top_k": 33})
    assert "33" in reason


@pytest.mark.parametrize(
    "version, cubins, text",
    [
        (None, None, "flashinfer-python is not installed; run pip install"),
        ("0.6.12", None, "flashinfer-python 0.6.12 is older than 0.6.13"),
        ("0.6.11.post1", None, "flashinfer-python 0.6.11.post1 is older than 0.6.13"),
        ("0.6.16.post4", None, "flashinfer-python 0.6.16.post4 is refused: its NVFP4 experts"),
        ("0.6.17", "0.6.17", "flashinfer-python 0.6.17 is refused: its NVFP4 experts return NaN"),
        ("0.7.2.post1", "0.6.13", "flashinfer-cubin 0.6.13 does not belong to flashinfer-python"),
    ],
)
def test_versions_that_are_refused(monkeypatch, version, cubins, text):
    found = {"flashinfer-python": version, "flashinfer-cubin": cubins}
    monkeypatch.setattr(library_module, "installed", found.get)
    (reason,) = why_not("flashinfer_trtllm", **LAYER)
    assert reason.startswith(text)
    library_module.library.cache_clear()
    try:
        with pytest.raises(
            UnsupportedError, match=r"^moe: the installed FlashInfer cannot be used, because "
        ):
            library()
    finally:
        library_module.library.cache_clear()


@pytest.mark.parametrize("version", ["0.6.13", "0.6.16.post3", "0.6.18", "0.7.2.post1"])
def test_versions_that_are_taken(monkeypatch, version):
    found = {"flashinfer-python": version, "flashinfer-cubin": version}
    monkeypatch.setattr(library_module, "installed", found.get)
    assert why_not("flashinfer_trtllm", **LAYER) == []


def test_a_version_that_is_none(monkeypatch):
    with pytest.raises(
        UnsupportedError, match=r"flashinfer-python: version must look like 0\.6\.13"
    ):
        library_module.version_key("nightly")


@pytest.mark.parametrize("capability", [None, (9, 0), (12, 0)])
def test_other_devices_are_refused_when_it_runs(emulated, claim, capability):
    weights = layer()
    arguments = prepared_arguments(weights)
    claim(capability)
    with pytest.raises(UnsupportedError) as refusal:
        OP(*tokens(2, weights), *arguments)
    got = ".".join(map(str, capability)) if capability else "a CPU"
    text = str(refusal.value)
    assert text.startswith("moe: kernel flashinfer_trtllm cannot run, because ")
    assert f"hidden is on cpu ({got})" in text and "compute capability 10.0 or 10.3" in text
    assert emulated.calls == []


def test_operands_that_the_launcher_would_misread(emulated):
    weights = layer(256, 192)
    call = tokens(2, weights)
    good = list(prepared_arguments(weights))
    other = good.copy()
    other[0] = good[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ShapeError, match=r"^moe: gate_up_packed must be contiguous"):
        OP(*call, *other)
    logical = get_kernel("reference").prepare(layer(144, 176), hidden_alignment=256)
    with pytest.raises(ShapeError, match=r"the padded hidden size must be a multiple of 128 "):
        OP(*tokens(2, layer(144, 176)), *nvfp4_moe_arguments(logical, TRTLLM.name))
    logical = get_kernel("reference").prepare(layer(256, 176), hidden_alignment=256)
    with pytest.raises(ShapeError, match=r"padded intermediate size must be a multiple of 64 "):
        OP(*tokens(2, layer(256, 176)), *nvfp4_moe_arguments(logical, TRTLLM.name))
    with pytest.raises(
        UnsupportedError,
        match=r"^moe: kernel flashinfer_trtllm cannot compute relu, because no nvfp4",
    ):
        relu = ["relu" if value == "silu" else value for value in good]
        OP(*call, *relu)
    x, ids, routing = tokens(2, weights)
    wide = ids[:, :1].expand(-1, 40), routing[:, :1].expand(-1, 40)
    with pytest.raises(UnsupportedError, match=r"^moe: kernel flashinfer_trtllm cannot route "):
        OP(x, *wide, *good)
    assert emulated.calls == []


# The public ways in.


def test_auto_chooses_it_and_fused_moe_prepares_once(emulated, monkeypatch):
    weights = layer()
    x, ids, routing = tokens(4, weights)
    prepares = []
    prepare = type(TRTLLM).prepare
    monkeypatch.setattr(
        type(TRTLLM), "prepare", lambda *a, **k: prepares.append(1) or prepare(*a, **k)
    )
    first = fused_moe(x, weights, ids, routing)
    assert torch.equal(fused_moe(x, weights, ids, routing), first) and len(prepares) == 1
    assert relative_error(first, expected(x, weights, ids, routing)) < LIMIT
    weights.hidden_scale.mul_(2)
    again = fused_moe(x, weights, ids, routing)
    assert len(prepares) == 2 and relative_error(again, expected(x, weights, ids, routing)) < LIMIT


def test_module_state_is_logical_and_moves(emulated, claim):
    weights = layer(272, 40)
    module = FusedExperts(weights)
    assert module.kernel == "flashinfer_trtllm"
    call = tokens(3, weights)
    want = module(*call)
    state = module.state_dict()
    for name, tensor in weights.tensors().items():
        kept = state[name.replace(".", "_")]
        assert torch.equal(kept.view(torch.uint8), tensor.view(torch.uint8))
    other = FusedExperts(layer(272, 40, seed=5), hidden_alignment=128)
    places = {name: buffer.data_ptr() for name, buffer in other.named_buffers()}
    other.load_state_dict(state)
    assert places == {name: buffer.data_ptr() for name, buffer in other.named_buffers()}
    assert torch.equal(other(*call), want)
    assert torch.equal(module.half()(*call), want)
    # Another device decides again: here the meta device and back to a CPU without Blackwell.
    claim(None)
    plain = FusedExperts(layer(272, 40, seed=6))
    assert plain.kernel == "reference"
    plain.load_state_dict(state)
    assert relative_error(plain(*call), reference_w4a4(call[0], weights, call[1], call[2])) < 0.5


def test_compiled_without_a_break(emulated, fresh_dynamo):
    from tiny_models import CapturingBackend

    weights = layer(272, 40)
    module, capture = FusedExperts(weights), CapturingBackend()
    compiled = torch.compile(module, backend=capture, fullgraph=True, dynamic=True)
    for count in (3, 5, 8):
        call = tokens(count, weights)
        assert torch.equal(compiled(*call), module(*call))
    (graph,) = capture.graphs
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"].count(OP) == 1


@pytest.mark.slow
@pytest.mark.parametrize("hidden, intermediate", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_fake_agrees(emulated, hidden, intermediate, dtype):
    weights = layer(hidden, intermediate)
    arguments = (*tokens(3, weights, dtype=dtype), *prepared_arguments(weights))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, arguments, test_utils=utils)
    logits, bias = torch.randn(3, 4), torch.empty(0)
    prepared = TRTLLM.prepare(weights, hidden_alignment=128)
    extra = nvfp4_moe_from_logits_arguments(prepared, Routing("softmax_topk", 2), TRTLLM.name)
    torch.library.opcheck(OP_FROM_LOGITS, (arguments[0], logits, bias, *extra), test_utils=utils)
