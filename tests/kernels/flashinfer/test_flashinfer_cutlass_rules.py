"""Rules of FlashInfer's CUTLASS kernel, and its emulator against the W4A4 definition.

Tensors are laid out here by reshapes, in the emulator by byte addresses. Global scales are powers
of two and block scales small, so that every GEMM is exact in float32 in any order of its sums.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashinfer_cutlass_emulator import (
    ACTIVATIONS,
    PAIRED,
    CallError,
    check_cutlass_call,
    emulate_cutlass_moe,
    quantize,
    stand_in,
)

from fp4moe.activations import ACTIVATIONS as OURS
from fp4moe.activations import get_activation
from fp4moe.experts import ExpertWeights
from fp4moe.formats import NVFP4
from fp4moe.formats.nvfp4 import NVFP4Values
from fp4moe.kernels import Layer
from fp4moe.kernels.flashinfer.cutlass import (
    FLASHINFER_CUTLASS,
    GATED,
    PARAMETERS,
    UNGATED,
    activation_reasons,
    enum_name,
)
from fp4moe.kernels.flashinfer.cutlass_nvfp4 import size_multiples
from fp4moe.kernels.flashinfer.library import FlashInfer
from fp4moe.reference import reference_w4a4
from fp4moe.testing import relative_error

KINDS = [(name, True) for name in GATED if name in OURS] + [(name, False) for name in UNGATED]
# Every parameter of each that has some.
PARAMETERISED = ["silu(alpha=1.702,beta=1,limit=7)", "silu(limit=10)", "silu_step(limit=7)"]
PARAMETERISED += ["silu_softcap(alpha=4,beta=25)"]
INSTALLED = importlib.util.find_spec("flashinfer") is not None
OLDER_NAMES = frozenset("Gelu Relu Silu Swiglu Geglu SwigluBias Relu2 Identity".split())
Kind = enum.Enum("Kind", list(dict.fromkeys((*ACTIVATIONS, *PAIRED))))  # type: ignore[misc]

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, TOP_K = 96, 128, 3, 7, 2

# Rounding gate, up and their product to bfloat16 moves the intermediate by up to d = 3 x 2^-9 of
# itself. Crossing a boundary of E2M1 costs a step s of at most 1/3 of the block's largest value,
# 2/3 of its RMS. The mean square is s x d, its root 0.0625; twice that, as the rows are few.
ROUNDING_LIMIT = 0.125


def biases(gated: bool) -> dict[str, torch.Tensor]:
    """Random biases beyond what bfloat16 holds."""
    rows = (1 + gated) * INTERMEDIATE
    return {
        "gate_up_bias": torch.randn(EXPERTS, rows),
        "down_bias": torch.randn(EXPERTS, HIDDEN) / 4,
    }


def make_weights(activation: str, gated: bool, **changes: Any) -> ExpertWeights:
    def values(rows: int, columns: int, global_scale: list[float]) -> NVFP4Values:
        steps = torch.tensor([0.25, 0.5, 0.75, 1.0])
        block_scale = steps[torch.randint(4, (EXPERTS, rows, columns // 16))]
        return NVFP4Values(
            torch.randint(256, (EXPERTS, rows, columns // 2), dtype=torch.uint8),
            block_scale.to(torch.float8_e4m3fn),
            torch.tensor(global_scale),
        )

    fields: dict[str, Any] = {
        "gate_up": values((1 + gated) * INTERMEDIATE, HIDDEN, [2**-6, 2**-7, 2**-5]),
        "down": values(HIDDEN, INTERMEDIATE, [2**-4, 2**-3, 2**-6]),
        "activation": activation,
        "gated": gated,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_experts": 9,
        "expert_offset": 4,
        "hidden_scale": torch.tensor([2**-8]),
        "intermediate_scale": torch.tensor([2**-9, 2**-10, 2**-6]),
    }
    return ExpertWeights(**(fields | changes))


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """[L, N, K / 16] e4m3 -> [L, N up to 128, K / 16 up to 4] bytes in the kernel's order."""
    local, rows, columns = scale.shape
    rows_up, columns_up = -(-rows // 128) * 128, -(-columns // 4) * 4
    full = torch.zeros(local, rows_up, columns_up, dtype=torch.uint8)
    full[:, :rows, :columns] = scale.view(torch.uint8)
    tiles = full.view(local, rows_up // 128, 4, 32, columns_up // 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(full.shape)


def make_call(weights: ExpertWeights, **changes: Any) -> dict[str, Any]:
    def up_first(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2, 1)[::-1], 1) if weights.gated else tensor

    ids = torch.tensor([[4, 6], [5, 4], [-1, 6], [9, 5], [3, 7], [6, 5], [4, -5]])
    local = ids - weights.expert_offset
    inside = (local >= 0) & (local < EXPERTS)
    s_w1, s_w2 = weights.gate_up.global_scale, weights.down.global_scale
    s_x, s_a = weights.hidden_scale, weights.intermediate_scale
    call: dict[str, Any] = {
        "input": torch.randn(TOKENS, HIDDEN).bfloat16(),
        "token_selected_experts": torch.where(inside, local, -1).int(),
        "token_final_scales": torch.rand(TOKENS, TOP_K),
        "fc1_expert_weights": up_first(weights.gate_up.packed).view(torch.int64),
        "fc2_expert_weights": weights.down.packed.view(torch.int64),
        "output_dtype": torch.bfloat16,
        "quant_scales": [
            (1 / s_x).reshape(()),
            swizzled(up_first(weights.gate_up.block_scale)).view(torch.int32),
            s_w1 * s_x,
            1 / s_a,
            swizzled(weights.down.block_scale).view(torch.int32),
            s_w2 * s_a,
        ],
        "activation_type": Kind[str(enum_name(weights.activation, weights.gated))],
    }
    found = get_activation(weights.activation)
    for name, argument in {} if found.plain else PARAMETERS[found.name].items():
        call[argument] = torch.full((EXPERTS,), getattr(found, name))
    if weights.gate_up_bias is not None and weights.down_bias is not None:
        rows = up_first(weights.gate_up_bias)
        call |= {"fc1_expert_biases": rows.bfloat16()}
        call |= {"fc2_expert_biases": weights.down_bias.bfloat16()}
    return call | changes


def expected(weights: ExpertWeights, call: dict[str, Any]) -> torch.Tensor:
    ids = call["token_selected_experts"] + weights.expert_offset
    return reference_w4a4(call["input"], weights, ids, call["token_final_scales"])


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_emulator_computes_the_w4a4_definition(activation: str, gated: bool) -> None:
    weights = make_weights(activation, gated)
    call = make_call(weights)
    wanted = expected(weights, call)
    # Only exp and tanh may differ, by an ulp, which rarely moves a code.
    assert relative_error(emulate_cutlass_moe(round_between=False, **call), wanted) < 2**-9
    result = stand_in(newer=True)(**call)[0]
    assert 0 < relative_error(result, wanted) < ROUNDING_LIMIT
    assert not wanted[4].any() and not result[4].any()


@pytest.mark.parametrize(("activation", "gated"), [(t, True) for t in PARAMETERISED] + KINDS)
def test_parameters_and_biases(activation: str, gated: bool) -> None:
    """Where the kernel rounds, and where it adds biases, the definition does, too."""
    weights = make_weights(activation.replace("limit=7", "limit=0.5"), gated, **biases(gated))
    call = make_call(weights)
    ids = call["token_selected_experts"] + weights.expert_offset
    args = call["input"], weights, ids, call["token_final_scales"]
    wanted = reference_w4a4(*args, intermediate_dtype=torch.bfloat16)
    # As above.
    assert relative_error(stand_in(newer=True)(**call)[0], wanted) < 2**-9
    # One rounding after the bias is another number.
    assert relative_error(stand_in(newer=True)(**call)[0], reference_w4a4(*args)) > 2**-9


@pytest.mark.parametrize("name", ["swiglu_alpha", "swiglu_beta", "swiglu_limit", "biases"])
def test_emulator_reads_parameters_and_biases(name: str) -> None:
    text = "silu(alpha=1.702,beta=1,limit=0.5)"
    weights = make_weights(text, True, **biases(True))
    call = make_call(weights)
    wanted = stand_in(newer=True)(**call)[0]
    left_out = ("fc1_expert_biases", "fc2_expert_biases") if name == "biases" else (name,)
    assert (
        relative_error(stand_in(newer=True)(**(call | dict.fromkeys(left_out)))[0], wanted) > 0.05
    )
    # The kernels of the others do not read what is theirs, so that the check refuses it.
    with pytest.raises(CallError, match="it is not read"):
        stand_in(newer=True)(
            **(make_call(make_weights("gelu", True)) | {"swiglu_limit": torch.ones(EXPERTS)})
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulator_rounds_where_the_kernel_does(dtype: torch.dtype) -> None:
    weights = make_weights("silu", gated=True, **biases(True))
    call = make_call(weights, output_dtype=dtype)
    names = ("input", "fc1_expert_biases", "fc2_expert_biases")
    call |= {name: call[name].to(dtype) for name in names}
    result = stand_in(newer=True)(**call)[0]
    parts = weights.dequantize()
    x = NVFP4.round_activation(call["input"].float(), weights.hidden_scale)
    wanted = torch.zeros(TOKENS, HIDDEN)
    for token, slot in (call["token_selected_experts"] >= 0).nonzero().tolist():
        expert = call["token_selected_experts"][token, slot]
        gate, up = ((parts[name][expert] @ x[token]).to(dtype).float() for name in ("gate", "up"))
        up_bias, gate_bias = call["fc1_expert_biases"][expert].float().chunk(2)
        gate, up = gate + gate_bias, up + up_bias
        y = (torch.nn.functional.silu(gate) * up).to(dtype).float()
        y = NVFP4.round_activation(y, weights.intermediate_scale[expert])
        y = (parts["down"][expert] @ y).to(dtype).float()
        y += call["fc2_expert_biases"][expert].float()
        wanted[token] += y * call["token_final_scales"][token, slot]
    assert relative_error(result, wanted.to(dtype)) < 2**-9


MUTATIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "gate first": lambda c: c.update(
        fc1_expert_weights=torch.cat(c["fc1_expert_weights"].chunk(2, 1)[::-1], 1)
    ),
    "scales not swizzled": lambda c: c["quant_scales"].__setitem__(
        1, c["quant_scales"][1].flip(1).contiguous()
    ),
    "input scale not inverted": lambda c: c["quant_scales"].__setitem__(
        0, 1 / c["quant_scales"][0]
    ),
    "alpha1 without the input": lambda c: c["quant_scales"][2].mul_(2**8),
    "alpha1 of another expert": lambda c: c["quant_scales"].__setitem__(
        2, c["quant_scales"][2].roll(1)
    ),
    "intermediate of another expert": lambda c: c["quant_scales"].__setitem__(
        3, c["quant_scales"][3].roll(1)
    ),
    "down scales of another expert": lambda c: c["quant_scales"].__setitem__(
        4, c["quant_scales"][4].roll(1, 0)
    ),
    "alpha2 without the intermediate": lambda c: c["quant_scales"][5].mul_(2**9),
    "nibbles swapped": lambda c: c.update(
        fc2_expert_weights=(
            (c["fc2_expert_weights"].view(torch.uint8) << 4)
            | (c["fc2_expert_weights"].view(torch.uint8) >> 4)
        ).view(torch.int64)
    ),
    "ids not moved": lambda c: c["token_selected_experts"].add_(1),
    "another activation": lambda c: c.update(activation_type=Kind["Swiglu"]),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_emulator_notices(mutation: str) -> None:
    weights = make_weights("gelu_tanh", gated=True)
    call = make_call(weights)
    wanted = expected(weights, call)
    MUTATIONS[mutation](call)
    assert (
        not relative_error(emulate_cutlass_moe(round_between=False, **call), wanted)
        < ROUNDING_LIMIT
    )


def test_one_intermediate_scale_serves_all_experts() -> None:
    weights = make_weights("relu2", gated=False, intermediate_scale=torch.full((EXPERTS,), 2**-8))
    call = make_call(weights)
    one = [*call["quant_scales"]]
    one[3] = one[3][0].clone()
    result = stand_in(newer=True)(**(call | {"quant_scales": one}))[0]
    assert torch.equal(result, stand_in(newer=True)(**call)[0])


@pytest.mark.parametrize("swizzle", [True, False])
def test_packed_input_gives_the_same(swizzle: bool) -> None:
    weights = make_weights("silu", gated=True)
    call = make_call(weights)
    wanted = stand_in(newer=True)(**call)[0]
    blocks = call["input"].float().view(TOKENS, -1, 16)
    scale = (blocks.abs().amax(-1) / 6 * 2**8).to(torch.float8_e4m3fn)
    # Element = code x block scale, so that dividing leaves the grid value.
    value = quantize(call["input"].float(), torch.tensor(2.0**8)).view(blocks.shape)
    element = value / scale.float().unsqueeze(-1)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    code = torch.searchsorted(grid, element.abs()) + 8 * (element < 0)
    code = code.reshape(TOKENS, HIDDEN).byte()
    padded = torch.zeros(TOKENS, 8, dtype=torch.uint8)
    padded[:, :6] = scale.view(torch.uint8)
    packed = call | {
        "input": code[:, ::2] | code[:, 1::2] << 4,
        "input_sf": swizzled(scale[None])[0] if swizzle else padded,
        "swizzled_input_sf": swizzle,
    }
    assert torch.equal(stand_in(newer=False)(**packed)[0], wanted)


def test_expert_parallel_rank_shifts_the_ids() -> None:
    weights = make_weights("silu", gated=True)
    call = make_call(weights)
    wanted = stand_in(newer=True)(**call)[0]
    ids = call["token_selected_experts"]
    call["token_selected_experts"] = torch.where(ids < 0, ids, ids + 2 * EXPERTS)
    shifted = call | {"ep_size": 3, "ep_rank": 2}
    assert torch.equal(stand_in(newer=True)(**shifted)[0], wanted)
    assert not stand_in(newer=True)(**call)[0].any()


def test_output_is_written_in_place() -> None:
    call = make_call(make_weights("relu", gated=False))
    output = torch.full((TOKENS, HIDDEN), torch.nan, dtype=torch.bfloat16)
    result = stand_in(newer=True)(**call, output=output)[0]
    assert result is output and torch.equal(output, stand_in(newer=True)(**call)[0])


def test_quantiser_is_that_of_the_definition() -> None:
    x = torch.randn(5, 64) * torch.logspace(-6, 3, 5).unsqueeze(1)
    x[0, :16] = 0
    x[1, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # ties at scale 1
    x[1, 8:16] = 0
    scale = torch.tensor(2.0**-7)
    assert torch.equal(quantize(x, 1 / scale) * scale, NVFP4.round_activation(x, scale))


def replaced(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def apply(call: dict[str, Any]) -> None:
        call["quant_scales"][index] = change(call["quant_scales"][index])

    return apply


def set_to(name: str, change: Callable[[Any], Any]) -> Callable:
    return lambda call: call.update({name: change(call.get(name))})


VIOLATIONS: list[tuple[Callable, str]] = [
    (set_to("fc1_expert_weights", lambda w: w.view(torch.uint8)), "weights must be int64"),
    (set_to("fc2_expert_weights", lambda w: w[..., :-1].contiguous()), "must be [3, 224, 6]"),
    (set_to("fc1_expert_weights", lambda w: w[..., :-1].contiguous()), "must be [3, 256, 6]"),
    (set_to("fc1_expert_weights", lambda w: w.mT.contiguous().mT), "fc1_expert_weights must be c"),
    (set_to("activation_type", lambda a: 3), "enum member"),
    (set_to("input", lambda x: x.float()), "would be read as packed FP4"),
    (set_to("input", lambda x: x.half()), "read as torch.bfloat16, the output_dtype"),
    (set_to("input", lambda x: x[:, :-1].contiguous()), "input must have 96 columns; got 95"),
    (set_to("input", lambda x: x.repeat(1, 2)[:, ::2]), "input must be contiguous"),
    (set_to("input", lambda x: x[:0]), "T > 0"),
    (set_to("input", lambda x: torch.zeros(7, 48).byte()), "needs input_sf"),
    (set_to("output_dtype", lambda d: torch.float32), "output_dtype must be bfloat16"),
    (set_to("input_sf", lambda s: torch.zeros(128, 8).byte()), "input_sf must be None"),
    (set_to("token_selected_experts", lambda i: i.long()), "must be int32"),
    (set_to("token_selected_experts", lambda i: i[:-1]), "token_selected_experts must be [7, K]"),
    (set_to("token_selected_experts", torch.zeros_like), "an id is repeated"),
    (set_to("token_final_scales", lambda w: w.bfloat16()), "must be float32"),
    (set_to("token_final_scales", lambda w: w[:, :1].contiguous()), "the shape of the ids"),
    (set_to("quant_scales", lambda s: s[:5]), "must hold 6 tensors; got 5"),
    (replaced(0, lambda s: s.reshape(1)), "quant_scales[0] must be [] or [3]; got [1]"),
    (replaced(1, lambda s: s.view(torch.uint8)), "quant_scales[1] must be torch.int32"),
    (replaced(1, lambda s: s[:, :-1].contiguous()), "quant_scales[1] must be [3, 256, 2]"),
    (replaced(2, lambda s: s[:1]), "quant_scales[2] must be [3]; got [1]"),
    (replaced(3, lambda s: s.double()), "quant_scales[3] must be torch.float32"),
    (replaced(3, lambda s: s * 0), "quant_scales[3] must be finite and above 0"),
    (replaced(4, lambda s: s[:, :96].contiguous()), "quant_scales[4] must be [3, 128, 2]"),
    (replaced(4, lambda s: torch.full_like(s, -1)), "quant_scales[4] must not hold NaN"),
    (set_to("output", lambda o: torch.empty(7, 64).bfloat16()), "no narrower one"),
    (set_to("swiglu_alpha", lambda a: torch.ones(1)), "swiglu_alpha must be float32 [3]"),
    (set_to("swiglu_beta", lambda a: torch.ones(3).half()), "swiglu_beta must be float32 [3]"),
    (set_to("swiglu_limit", lambda a: torch.zeros(3)), "swiglu_limit must be above 0"),
    (set_to("swiglu_limit", lambda a: torch.ones(3) / 0), "swiglu_limit must be finite"),
    (set_to("situ_beta", lambda a: torch.ones(3)), "situ_beta must be None for Swiglu"),
    (set_to("fc1_expert_biases", lambda b: torch.ones(3, 256)), "both there or neither"),
    (set_to("use_w4_group_scaling", lambda a: True), "use_w4_group_scaling must be False"),
    (set_to("ep_rank", lambda r: 1), "ep_rank must lie in 0..0; got 1"),
]


@pytest.mark.parametrize(("violate", "text"), VIOLATIONS, ids=[text for _, text in VIOLATIONS])
def test_violations_are_refused(violate: Callable, text: str) -> None:
    call = make_call(make_weights("silu", gated=True))
    violate(call)
    with pytest.raises(CallError) as caught:
        check_cutlass_call(stand_in(newer=True), (), call)
    assert text in str(caught.value)


def test_arguments_must_be_named_and_known() -> None:
    call = make_call(make_weights("silu", gated=True))
    with pytest.raises(CallError, match="arguments are positional"):
        stand_in(newer=True)(*call.values())
    with pytest.raises(TypeError, match="use_fused_finalize"):
        stand_in(newer=False)(**call, use_fused_finalize=False)
    del call["quant_scales"]
    with pytest.raises(TypeError, match="quant_scales"):
        stand_in(newer=False)(**call)


@pytest.mark.parametrize("rows", [64, 704, 1856])
def test_ungated_rows_that_are_checked_and_read_differently(rows: int) -> None:
    call = make_call(make_weights("relu2", gated=False))
    call["fc1_expert_weights"] = torch.zeros(EXPERTS, rows, HIDDEN // 16, dtype=torch.int64)
    call["fc2_expert_weights"] = torch.zeros(EXPERTS, HIDDEN, rows // 16, dtype=torch.int64)
    with pytest.raises(CallError, match=f"{rows} ungated rows"):
        check_cutlass_call(stand_in(newer=True), (), call)
    assert rows % size_multiples(gated=False)[1] and not rows % size_multiples(gated=True)[1]


@pytest.fixture
def library() -> Any:
    with warnings.catch_warnings():
        # Version 0.6.13 uses names that its dependency cutlass-dsl has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("flashinfer.fused_moe")


@pytest.mark.skipif(not INSTALLED, reason="needs flashinfer-python")
def test_stand_in_has_the_parameters_of_the_library(library: Any) -> None:
    cutlass_fused_moe = library.cutlass_fused_moe
    real = inspect.signature(cutlass_fused_moe).parameters
    older, newer = (inspect.signature(stand_in(newer=n)).parameters for n in (False, True))
    # Those between 0.6.13 and 0.7.2 have some of what came.
    assert set(older) <= set(real) <= set(newer)
    assert set(real) == set(older) or "use_fused_finalize" in real
    assert set(real) == set(newer) or "backend" not in real
    for name, parameter in newer.items():
        if name in real and name != "activation_type":
            assert parameter.default == real[name].default, name
    call = make_call(make_weights("silu", gated=True))
    assert check_cutlass_call(cutlass_fused_moe, (), call)["swizzled_input_sf"] is True


@pytest.mark.skipif(not INSTALLED, reason="needs flashinfer-python")
def test_names_are_those_of_the_library(library: Any) -> None:
    names = frozenset(member.name for member in library.core.ActivationType)
    assert {*GATED.values(), *UNGATED.values()} - names <= {"GegluTanh", "Situ"}
    known = set(inspect.signature(library.cutlass_fused_moe).parameters)
    wanted = {argument for names in PARAMETERS.values() for argument in names.values()}
    assert wanted - known == (set() if "Situ" in names else {"situ_beta", "situ_linear_beta"})


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_enum_member_computes_our_activation(activation: str, gated: bool) -> None:
    name = enum_name(activation, gated)
    x = torch.linspace(-8, 8, 1001)
    emulated_gated, function = ACTIVATIONS[str(name)]
    torch.testing.assert_close(function(x), get_activation(activation).function(x))
    assert emulated_gated is gated


def known_to_have(names: frozenset[str], *arguments: str) -> FlashInfer:
    swiglu = "swiglu_alpha", "swiglu_beta", "swiglu_limit"
    functions = {"cutlass_fused_moe": frozenset((*swiglu, *arguments))}
    return FlashInfer("0", None, False, False, functions, names)


def test_reasons() -> None:
    assert FLASHINFER_CUTLASS.devices_for("nvfp4").listed == ((12, 0), (12, 1), (10, 0), (10, 3))
    for activation in OURS:
        for gated in (True, False):
            refused = activation_reasons(activation, gated, None)
            assert bool(refused) != ((activation, gated) in KINDS)
    text = "activation must be one of silu, gelu_tanh, gelu, silu_step, silu_softcap with a gate, "
    text += "with alpha, beta or limit only silu, silu_step, silu_softcap, got "
    for refused_text in ("relu2", "gelu(limit=7)", "relu(beta=1)"):
        assert activation_reasons(refused_text, True, None) == [text + refused_text]
    assert activation_reasons("silu(alpha=1.702)", False, None) == [
        "activation must be one of relu2, relu, silu, gelu, identity without a gate, got "
        "silu(alpha=1.702)"
    ]
    assert all(activation_reasons(text, True, None) == [] for text in PARAMETERISED)
    assert activation_reasons("gelu_tanh", False, None) == [
        "activation must be one of relu2, relu, silu, gelu, identity without a gate, got gelu_tanh"
    ]
    advice = "with a gate needs: install a newer flashinfer-python"
    older, situ = known_to_have(OLDER_NAMES), PARAMETERISED[3]
    assert activation_reasons("gelu_tanh", True, older) == [
        f"the installed FlashInfer has no ActivationType.GegluTanh, which gelu_tanh {advice}"
    ]
    assert activation_reasons("gelu_tanh", True, known_to_have(OLDER_NAMES | {"GegluTanh"})) == []
    assert activation_reasons(situ, True, older) == [
        f"the installed FlashInfer has no {what}, which {situ} {advice}"
        for what in ("ActivationType.Situ", "argument situ_beta", "argument situ_linear_beta")
    ]
    assert activation_reasons(PARAMETERISED[0], True, older) == []
    newer = known_to_have(OLDER_NAMES | {"Situ"}, "situ_beta", "situ_linear_beta")
    assert activation_reasons(situ, True, newer) == []


def test_sizes_matter_only_without_padding() -> None:
    def exactly(activation: str, gated: bool, hidden: int, intermediate: int) -> list[str]:
        layer = Layer(activation, gated, hidden, intermediate, 8, 2)
        return FLASHINFER_CUTLASS.reasons_without_padding(layer)

    assert activation_reasons("relu2", False, None) == []
    assert exactly("silu", True, 2816, 704) == []
    assert exactly("relu2", False, 2880, 1856) == [
        "hidden_size must be a multiple of 128 without padding, got 2880",
        "intermediate_size must be a multiple of 128 without padding, got 1856",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_sf": torch.zeros(7, 6).byte()}, "input_sf must hold 56 bytes"),
        ({"input_sf": torch.zeros(7, 8).byte()}, "quant_scales[0] must be 0-d"),
    ],
)
def test_violations_of_packed_input_are_refused(changes: dict[str, Any], text: str) -> None:
    call = make_call(make_weights("silu", gated=True), input=torch.zeros(7, 48).byte(), **changes)
    call["quant_scales"][0] = torch.ones(EXPERTS)
    with pytest.raises(CallError) as caught:
        check_cutlass_call(stand_in(newer=True), (), call | {"swizzled_input_sf": False})
    assert text in str(caught.value)
