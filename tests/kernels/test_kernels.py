"""Which kernel runs what: why_not, select_kernel, and the reasons that they give."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from fp4moe import ExpertWeights, FusedExperts, fused_moe, why_not
from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import (
    KERNELS,
    Layer,
    base,
    choose_kernel,
    current_capability,
    get_kernel,
    select_kernel,
)
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.testing import make_layer

LAYER = {
    "activation": "silu",
    "gated": True,
    "hidden_size": 2816,
    "intermediate_size": 704,
    "num_experts": 128,
    "top_k": 8,
}
# They have tests of their own; on other devices they say no, in these words.
REFUSALS = {
    "flashinfer_trtllm": "needs compute capability 10.0 or 10.3, got ",
    "flashinfer_cutlass": "needs compute capability 12.0, 12.1, 10.0 or 10.3, got ",
    "triton_w8a8": "needs compute capability 8.9 or newer, got ",
    "hopper": "needs compute capability 9.0, got ",
    "triton": "needs compute capability 8.0 or newer, got ",
    "humming": "needs compute capability 7.5 to 9.0, got ",
}
PRESENT = ("reference", "reference_w4a4")
# For MXFP4 alone: its tests are with FlashInfer's others.
W4A16 = "flashinfer_trtllm_w4a16"
MULTIPLES = {"flashinfer_cutlass": 128, "hopper": 64, "triton": 64, "humming": 128}
# Kernels that do not have NVFP4, with a format that they have.
FORMATS_OF = {"triton_w8a8": {"format": "fp8"}}


def test_the_names_are_those_of_the_contract():
    assert tuple(KERNELS) == (*REFUSALS, *PRESENT, W4A16)
    assert all(kernel.name == name for name, kernel in KERNELS.items())


@pytest.mark.parametrize("capability", [None, (6, 1), (7, 0)])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", [*REFUSALS, *PRESENT])
def test_why_not_by_name(name, padded, capability, monkeypatch):
    monkeypatch.setattr(base, "query_capability", lambda device: None)
    own = LAYER | FORMATS_OF.get(name, {})
    reasons = why_not(name, **own, padded=padded, capability=capability)
    got = f"{capability[0]}.{capability[1]}" if capability else "a CPU"
    assert reasons == ([] if name in PRESENT else [REFUSALS[name] + got])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_auto_runs_every_activation(activation, gated):
    assert why_not("auto", **LAYER | {"activation": activation, "gated": gated}) == []
    assert why_not("reference", **LAYER | {"activation": activation, "gated": gated}) == []


@pytest.mark.parametrize("name", PRESENT)
def test_without_padding_sizes_must_be_multiples_of_16(name):
    odd = LAYER | {"hidden_size": 2880, "intermediate_size": 2882}
    assert why_not(name, **odd) == []
    assert why_not(name, **odd, padded=False) == [
        "intermediate_size must be a multiple of 16 without padding, got 2882"
    ]
    odd["hidden_size"] = 31
    assert why_not(name, **odd, padded=False) == [
        "hidden_size must be a multiple of 16 without padding, got 31",
        "intermediate_size must be a multiple of 16 without padding, got 2882",
    ]
    # The kernel's own word on padding is what ExpertWeights holds.
    layer = Layer("silu", True, 31, 50, 4, 2)
    weights = ExpertWeights.quantize(
        up=torch.ones(1, 50, 31), down=torch.ones(1, 31, 50), activation="silu"
    )
    prepared = get_kernel(name).prepare(weights, hidden_alignment=256)
    multiples = get_kernel(name).size_multiples(layer, 256)
    assert weights.hidden_padded % multiples[0] == weights.intermediate_padded % multiples[1] == 0
    back = get_kernel(name).restore(prepared)
    assert back.metadata() == weights.metadata()
    assert all(back.tensors()[n].data_ptr() == t.data_ptr() for n, t in weights.tensors().items())


def test_auto_lists_each_candidate_with_its_reasons(monkeypatch):
    monkeypatch.setattr(base, "query_capability", lambda device: None)
    odd = LAYER | {"hidden_size": 31}
    assert why_not("auto", **odd) == []
    # triton and reference_w4a4 would never be chosen by themselves, and are not listed.
    assert why_not("auto", **odd, padded=False) == [
        f"flashinfer_trtllm: {REFUSALS['flashinfer_trtllm']}a CPU",
        "flashinfer_trtllm: no kernel for hidden_size 31 x intermediate_size 704 at exactly this "
        "size; the next size with one is 128 x 704",
        *(
            line
            for name, multiple in MULTIPLES.items()
            if KERNELS[name].automatic
            for line in (
                f"{name}: {REFUSALS[name]}a CPU",
                f"{name}: hidden_size must be a multiple of {multiple} without padding, got 31",
            )
        ),
        "reference: hidden_size must be a multiple of 16 without padding, got 31",
    ]


@pytest.mark.parametrize("call", [why_not, select_kernel], ids=["why_not", "select_kernel"])
def test_unknown_kernel_names_the_known_ones(call):
    with pytest.raises(UnsupportedError) as error:
        if call is why_not:
            why_not("trtllm", **LAYER)
        else:
            select_kernel("trtllm", Layer(**LAYER), None, caller="why_not")
    assert str(error.value) == (
        "why_not: kernel must be auto or one of flashinfer_trtllm, flashinfer_cutlass, "
        "triton_w8a8, hopper, triton, humming, reference, reference_w4a4, flashinfer_trtllm_w4a16; "
        "got 'trtllm'. Pass one of these names."
    )


def test_unknown_activation():
    with pytest.raises(UnsupportedError) as error:
        why_not("reference", **LAYER | {"activation": "swiglu"})
    assert str(error.value) == (
        "why_not: activation must be one of silu, gelu_tanh, gelu, relu2, relu, identity, "
        "silu_step, silu_softcap; got 'swiglu'. Pass one of these names."
    )


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_experts", "top_k"])
@pytest.mark.parametrize("value", [0, -16])
def test_sizes_below_one(name, value):
    with pytest.raises(ShapeError) as error:
        why_not("auto", **LAYER | {name: value})
    assert str(error.value) == (
        f"why_not: {name} must be at least 1; got {value}. Pass the size of the layer."
    )


def test_more_experts_a_token_than_there_are():
    with pytest.raises(ShapeError) as error:
        why_not("auto", **LAYER | {"top_k": 129})
    assert str(error.value) == (
        "why_not: top_k must not exceed num_experts = 128; got 129. Pass experts per token."
    )
    assert why_not("auto", **LAYER | {"top_k": 128}) == []


def test_select_kernel():
    layer = Layer(**LAYER)
    assert select_kernel("auto", layer, None, caller="f") == "reference"
    assert choose_kernel("auto", layer, None) == ("reference", [])
    assert choose_kernel("triton", layer, None) == (None, [f"triton: {REFUSALS['triton']}a CPU"])
    for name in PRESENT:
        assert select_kernel(name, layer, None, caller="f") == name
    for name in REFUSALS:
        own = dataclasses.replace(layer, **FORMATS_OF.get(name, {}))
        with pytest.raises(UnsupportedError) as error:
            select_kernel(name, own, None, caller="f")
        text = str(error.value)
        assert text.startswith(f"f: kernel '{name}' cannot run this layer (gated silu, 128 experts")
        assert f"because {name}: {REFUSALS[name]}a CPU. " in text


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
@pytest.mark.parametrize("format", ["fp8", "fp8_channel", "fp8_block", "mxfp8", "nvfp4"])
def test_auto_rounds_activations_only_where_the_checkpoint_does(format):
    layer = Layer(**LAYER, format=format)
    rounded = dataclasses.replace(layer, quantized_activations=True)
    assert not KERNELS["triton_w8a8"].automatic_for(layer)
    assert KERNELS["triton_w8a8"].automatic_for(rounded)
    for capability in ((8, 0), (8, 9), (9, 0)):
        both = [choose_kernel("auto", each, capability)[0] for each in (layer, rounded)]
        fits = format.startswith("fp8") and capability > (8, 0)
        assert both == ["triton", "triton_w8a8" if fits else "triton"]
        # Who asks for 16-bit activations by name gets them.
        assert choose_kernel("triton", rounded, capability)[0] == "triton"


def test_auto_that_finds_none_lists_every_candidate(monkeypatch):
    """With `reference` refusing, nothing is left, and each refusal is in the message."""
    monkeypatch.setattr(ReferenceKernel, "reasons_not_to_run", lambda *args: ["a", "b"])
    layer = Layer(**LAYER)
    assert choose_kernel("auto", layer, (7, 0))[0] is None
    with pytest.raises(UnsupportedError) as error:
        select_kernel("auto", layer, (7, 0), caller="f")
    assert str(error.value).startswith("f: no kernel can run this layer (gated silu, 128 experts")
    listed = "".join(f"{n}: {t}7.0. " for n, t in REFUSALS.items() if KERNELS[n].automatic)
    assert f"because {listed}reference: a; b. " in str(error.value)


def test_get_kernel_wants_a_choice():
    with pytest.raises(UnsupportedError) as error:
        get_kernel("auto", caller="moe")
    assert str(error.value).startswith("moe: kernel must be the name of one kernel; got 'auto'.")
    with pytest.raises(UnsupportedError, match=r"^moe: kernel must be auto or one of"):
        get_kernel("nope", caller="moe")


def test_capability_of_a_cpu():
    assert current_capability(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert current_capability() is None


@pytest.mark.gpu
def test_capability_of_a_gpu():
    assert current_capability() == torch.cuda.get_device_capability()
    assert current_capability(torch.device("cuda:0")) == torch.cuda.get_device_capability(0)
    assert current_capability(torch.device("cpu")) is None


@pytest.mark.parametrize("name", REFUSALS)
def test_a_kernel_asked_for_by_name_is_never_replaced(name):
    weights = make_layer(4, 48, 32, "relu2", gated=False, **FORMATS_OF.get(name, {}))
    x, ids, routing = torch.randn(5, 48), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    calls = {
        "fused_moe": lambda: fused_moe(x, weights, ids, routing, kernel=name),
        "FusedExperts": lambda: FusedExperts(weights, name),
    }
    for caller, call in calls.items():
        with pytest.raises(UnsupportedError) as error:
            call()
        start = (
            f"{caller}: kernel '{name}' cannot run this layer (relu2, 4 experts of 48 x 32, CPU)"
        )
        assert str(error.value).startswith(f"{start}, because {name}: {REFUSALS[name]}a CPU. ")


def test_a_kernel_that_cannot_exist_says_why():
    layer = {"activation": "silu", "gated": True, "num_experts": 8, "top_k": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    (reason,) = why_not("humming_w4a8", **layer, **sizes, capability=(9, 0))
    assert "blocks of 32 or more values, NVFP4 has blocks of 16" in reason
    with pytest.raises(UnsupportedError, match=r"because humming_w4a8: humming-kernels"):
        select_kernel("humming_w4a8", Layer("silu", True, 64, 64, 8, 2), (9, 0), caller="here")
    assert "humming_w4a8" not in KERNELS
