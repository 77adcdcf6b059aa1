"""The checker and the emulator of CUTLASS' FP8 calls notice what is wrong in a call."""

from __future__ import annotations

import enum
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashinfer_cutlass_emulator import ACTIVATIONS, PAIRED, CallError, stand_in
from flashinfer_cutlass_fp8 import check_cutlass_fp8_call, emulate_cutlass_fp8, is_fp8_call

E4M3 = torch.float8_e4m3fn
EXPERTS, TOKENS, HIDDEN, INTERMEDIATE, TOP_K = 3, 5, 256, 128, 2
FP8S = ("fp8", "fp8_block")
Kind = enum.Enum("Kind", list(dict.fromkeys((*ACTIVATIONS, *PAIRED))))  # type: ignore[misc]


def codes(*shape: int) -> torch.Tensor:
    """Any finite numbers of both signs."""
    top = torch.randint(0, 0x7F, shape, dtype=torch.uint8)
    return (top | torch.randint(2, shape, dtype=torch.uint8) << 7).view(E4M3)


def good(format: str, activation: str = "Swiglu") -> dict[str, Any]:
    """A call with all that the function wants, of random numbers."""
    gated = activation in PAIRED or ACTIVATIONS[activation][0]
    rows = INTERMEDIATE * (1 + gated)
    call: dict[str, Any] = {
        "token_selected_experts": torch.tensor([[0, 1], [2, -1], [1, 2], [-1, -1], [2, 0]]).int(),
        "token_final_scales": torch.rand(TOKENS, TOP_K),
        "fc1_expert_weights": codes(EXPERTS, rows, HIDDEN),
        "fc2_expert_weights": codes(EXPERTS, HIDDEN, INTERMEDIATE),
        "output_dtype": torch.bfloat16,
        "activation_type": Kind[activation],
    }
    if format == "fp8":
        dequant = torch.rand(EXPERTS) / 2**12 + 2**-14, torch.rand(EXPERTS) + 0.5
        encode = torch.rand(EXPERTS) + 1
        scales = [dequant[0], encode, dequant[1], torch.tensor(0.5)]
        return call | {"input": codes(TOKENS, HIDDEN), "quant_scales": scales}
    scales = [
        torch.rand(EXPERTS, rows // 128, HIDDEN // 128) / 2**8,
        torch.rand(EXPERTS, HIDDEN // 128, INTERMEDIATE // 128),
    ]
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    return call | {"input": x, "quant_scales": scales, "use_deepseek_fp8_block_scale": True}


def check(call: dict[str, Any]) -> dict[str, Any]:
    return check_cutlass_fp8_call(stand_in(newer=True), (), call)


@pytest.mark.parametrize("activation", ["Swiglu", "Geglu", "SwigluStep", "Situ", "Relu2", "Gelu"])
@pytest.mark.parametrize("format", FP8S)
def test_a_sound_call_passes_and_computes(format: str, activation: str) -> None:
    call = good(format, activation)
    assert is_fp8_call(call)
    output = torch.full((TOKENS, HIDDEN), torch.nan, dtype=torch.bfloat16)
    result = emulate_cutlass_fp8(**check(call | {"output": output}))
    assert result is output and result[3].eq(0).all() and result[0].ne(0).any()
    assert torch.equal(emulate_cutlass_fp8(**check(call)), result)


def test_one_scale_of_the_intermediate_serves_all_experts() -> None:
    call = good("fp8")
    call["quant_scales"][1] = torch.full((EXPERTS,), 1.5)
    wanted = emulate_cutlass_fp8(**check(call))
    call["quant_scales"][1] = torch.tensor(1.5)
    assert torch.equal(emulate_cutlass_fp8(**check(call)), wanted)


def test_blocks_by_hand() -> None:
    """One token of 448s in its first block and 0 in the second; up 2, gate 1, relu2 of neither."""
    call = good("fp8_block", "Relu2")
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 448, 224
    first = torch.zeros(1, INTERMEDIATE, HIDDEN)
    first[0, 0, :2], first[0, 1, 0] = 0.5, -1
    second = torch.zeros(1, HIDDEN, INTERMEDIATE)
    second[0, 5, 0] = 2
    call |= {
        "input": x,
        "token_selected_experts": torch.zeros(1, 1).int(),
        "token_final_scales": torch.full((1, 1), 0.25),
        "fc1_expert_weights": first.to(E4M3),
        "fc2_expert_weights": second.to(E4M3),
        "quant_scales": [torch.tensor([[[0.5, 8.0]]]), torch.tensor([[[0.125], [7.0]]])],
    }
    # relu2 of (448 + 224) / 2 x 0.5 = 168, times 2 x 0.125 x 0.25.
    result = emulate_cutlass_fp8(**check(call))
    assert result[0, 5] == 168**2 / 16 and result.count_nonzero() == 1


def scales(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def apply(call: dict[str, Any]) -> None:
        call["quant_scales"][index] = change(call["quant_scales"][index])

    return apply


def set_to(name: str, change: Callable[[Any], Any]) -> Callable:
    return lambda call: call.update({name: change(call.get(name))})


BOTH: list[tuple[Callable, str]] = [
    (set_to("fc1_expert_weights", lambda w: w.view(torch.int8)), "weights must be float8_e4m3fn"),
    (set_to("fc1_expert_weights", lambda w: w[:, :-1].contiguous()), "must be [3, 256, 256]; got"),
    (set_to("fc2_expert_weights", lambda w: w.mT), "fc2_expert_weights must be contiguous"),
    (set_to("activation_type", lambda a: 3), "enum member"),
    (set_to("input", lambda x: x.float()), "input must be torch."),
    (set_to("input", lambda x: x[:, :-16].contiguous()), "input must have 256 columns; got 240"),
    (set_to("input", lambda x: x[:0]), "T > 0"),
    (set_to("input_sf", lambda s: torch.zeros(4)), "input_sf must be None"),
    (set_to("output_dtype", lambda d: torch.float16), "output_dtype must be bfloat16"),
    (set_to("output", lambda o: torch.empty(5, 128).bfloat16()), "no narrower one"),
    (set_to("token_selected_experts", lambda i: i.long()), "must be int32"),
    (set_to("token_selected_experts", torch.zeros_like), "an id is repeated"),
    (set_to("token_final_scales", lambda w: w.bfloat16()), "must be float32"),
    (set_to("quant_scales", lambda s: s[:1]), "quant_scales must hold"),
    (scales(0, lambda s: s.double()), "quant_scales[0] must be float32"),
    (scales(0, lambda s: s / 0), "quant_scales[0] must be finite"),
    (scales(0, lambda s: -s), "quant_scales[0] must be a"),
    (set_to("swiglu_limit", lambda a: torch.zeros(3)), "swiglu_limit must be above 0"),
    (set_to("situ_beta", lambda a: torch.ones(3)), "situ_beta must be None for Swiglu"),
    (set_to("fc1_expert_biases", lambda b: torch.ones(3, 256)), "both there or neither"),
    (set_to("use_mxfp8_act_scaling", lambda a: True), "use_mxfp8_act_scaling must be False"),
    (set_to("ep_rank", lambda r: 1), "ep_rank must lie in 0..0; got 1"),
]
VIOLATIONS = [(format, *each) for format in FP8S for each in BOTH]
VIOLATIONS += [
    ("fp8", scales(0, lambda s: s.view(3, 1)), "quant_scales[0] must be [3]; got [3, 1]"),
    ("fp8", scales(1, lambda s: s[:1]), "quant_scales[1] must be [] or [3]; got [1]"),
    ("fp8", scales(1, torch.zeros_like), "quant_scales[1] must be above 0"),
    ("fp8", scales(3, lambda s: s.view(1)), "quant_scales[3] must be []; got [1]"),
    ("fp8", set_to("use_deepseek_fp8_block_scale", lambda f: True), "input must be torch.bfloat16"),
    ("fp8_block", set_to("use_deepseek_fp8_block_scale", lambda f: False), "torch.float8_e4m3fn"),
    ("fp8_block", scales(0, lambda s: s[:, :1].contiguous()), "quant_scales[0] must be [3, 2"),
    ("fp8_block", scales(0, lambda s: s * 1e-15), "quant_scales[0] must hold none below 1e-10"),
    ("fp8_block", scales(1, lambda s: s.mT.contiguous()), "quant_scales[1] must be [3, 2, 1]"),
]


@pytest.mark.parametrize(("format", "violate", "text"), VIOLATIONS)
def test_violations_are_refused(format: str, violate: Callable, text: str) -> None:
    call = good(format)
    violate(call)
    with pytest.raises(CallError) as caught:
        check(call)
    assert text in str(caught.value)


@pytest.mark.parametrize(("format", "multiple"), [("fp8", 32), ("fp8_block", 128)])
def test_sizes(format: str, multiple: int) -> None:
    call = good(format)
    size = multiple // 2 * 3
    call["fc1_expert_weights"] = codes(EXPERTS, 2 * size, HIDDEN)
    call["fc2_expert_weights"] = codes(EXPERTS, HIDDEN, size)
    with pytest.raises(CallError, match=f"multiples of {multiple}; got hidden 256, .* {size}"):
        check(call)


def test_arguments_are_those_of_the_library() -> None:
    with warnings.catch_warnings():
        # Version 0.6.13 uses names that its dependency cutlass-dsl has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        fused_moe = pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
    function = fused_moe.cutlass_fused_moe
    for format in FP8S:
        call = good(format)
        assert check_cutlass_fp8_call(function, (), call).keys() == {
            *inspect.signature(function).parameters
        }
        with pytest.raises(CallError, match="arguments are positional"):
            check_cutlass_fp8_call(function, (call["input"],), {})
