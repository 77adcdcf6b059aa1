"""The rules of TRT-LLM-Gen against its kernel manifest and against the library's own sources."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import re
from types import MappingProxyType

import pytest

from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels.flashinfer.trtllm_rules import (
    ACTIVATION_NAMES,
    FORMATS,
    NEWER_TIERS_SINCE,
    ROUTING_TIERS,
    SHAPE_RULES,
    epilogue,
    reasons,
    routing_reasons,
    routing_tiers,
    size_multiples,
    token_tiles,
)
from fp4moe.layer import HIDDEN_ALIGNMENTS

DATA = pathlib.Path(__file__).parents[2] / "data" / "trtllm_gen_kernels.json"
# The name in the file that is not ours.
OURS = {"fp8_per_tensor": "fp8"}
ROWS = [
    {**row, "format": OURS.get(row["format"], row["format"])}
    for row in json.loads(DATA.read_text("utf-8"))["rows"]
]
KINDS = sorted({(row["format"], row["activation"]) for row in ROWS})


def rows_of(format, activation):
    """[(hidden_size, intermediate_size, tiles)] of one kind."""
    return [
        (row["hidden_size"], row["intermediate_size"], tuple(row["tiles"]))
        for row in ROWS
        if (row["format"], row["activation"]) == (format, activation)
    ]


def test_the_data_is_whole():
    assert len(ROWS) == 6849
    keys = {(r["format"], r["activation"], r["hidden_size"], r["intermediate_size"]) for r in ROWS}
    assert len(keys) == len(ROWS)
    assert {(rule.format, rule.epilogue.lower()) for rule in SHAPE_RULES} == set(KINDS)
    assert {rule.format for rule in SHAPE_RULES} == set(FORMATS)


@pytest.mark.parametrize(("format", "activation"), KINDS)
def test_every_row_of_the_manifest(format, activation):
    rows = rows_of(format, activation)
    wrong = [row for row in rows if token_tiles(format, activation, *row[:2]) != row[2]]
    assert not wrong, f"{len(wrong)} of {len(rows)}, first {wrong[:5]}"
    # Both answers occur, so that neither "always" nor "never" passes.
    assert {bool(row[2]) for row in rows} == {True, False}


def mutations(rule):
    """The rule with each of its numbers halved and doubled, and without each of its tiles."""
    for factor in (0.5, 2):
        multiple = int(rule.intermediate_multiple * factor)
        yield dataclasses.replace(rule, intermediate_multiple=multiple)
        for tile, hidden_multiple in rule.hidden_multiples.items():
            changed = {**rule.hidden_multiples, tile: int(hidden_multiple * factor)}
            yield dataclasses.replace(rule, hidden_multiples=MappingProxyType(changed))
    for tile in rule.hidden_multiples:
        fewer = {t: m for t, m in rule.hidden_multiples.items() if t != tile}
        yield dataclasses.replace(rule, hidden_multiples=MappingProxyType(fewer))


@pytest.mark.parametrize("rule", SHAPE_RULES, ids=lambda r: f"{r.format}-{r.epilogue}")
def test_the_manifest_notices_every_changed_number(rule):
    rows = rows_of(rule.format, rule.epilogue.lower())
    assert all(rule.tiles(*row[:2]) == row[2] for row in rows)
    mutated = list(mutations(rule))
    assert len(mutated) == 2 + 3 * len(rule.hidden_multiples)
    unnoticed = [m for m in mutated if all(m.tiles(*row[:2]) == row[2] for row in rows)]
    assert not unnoticed


@pytest.mark.parametrize(
    ("format", "activation", "sizes", "tiles"),
    [
        ("nvfp4", "Geglu", (2816, 704), (8, 16, 32, 64, 128, 256)),
        ("nvfp4", "geglu", (2816, 176), ()),
        ("nvfp4", "Relu2", (2688, 1856), ()),
        ("nvfp4", "Relu2", (2688, 1920), (8, 16, 32, 64, 128)),
        ("fp8", "Swiglu", (2688, 704), (8, 16, 32, 64, 128, 192, 256)),
        ("mxfp8", "Swiglu", (2688, 1920), (64, 128, 256)),
        # No kernel of either at any size.
        ("fp8", "Geglu", (2816, 768), ()),
        ("mxfp8", "Geglu", (2816, 768), ()),
    ],
)
def test_tiles_of_known_models(format, activation, sizes, tiles):
    assert token_tiles(format, activation, *sizes) == tiles


def test_epilogues():
    forms = [(name, gated) for name in ACTIVATIONS for gated in (True, False)]
    assert set(ACTIVATION_NAMES) <= set(forms)
    found = {form: epilogue(*form) for form in forms if epilogue(*form) is not None}
    assert found == {
        ("silu", True): "Swiglu",
        ("gelu_tanh", True): "Geglu",
        ("gelu", True): "Geglu",
        ("relu2", False): "Relu2",
    }


WITH_PARAMETERS = "gated silu (also with alpha, beta and limit)"
FORMS_OF_NVFP4 = f"{WITH_PARAMETERS}, gated gelu_tanh, gated gelu, ungated relu2"


@pytest.mark.parametrize("padded", [True, False])
def test_reasons_name_the_activations_that_have_kernels(padded):
    for name in ACTIVATIONS:
        for gated in (True, False):
            if (name, gated) not in ACTIVATION_NAMES:
                form = f"{'gated' if gated else 'ungated'} {name}"
                text = f"no nvfp4 kernel for {form}; there are kernels for {FORMS_OF_NVFP4}"
                assert reasons(name, gated, 2816, 704, padded=padded) == [text]
    assert reasons("gelu", True, 2816, 768, "mxfp8", padded) == [
        f"no mxfp8 kernel for gated gelu; there are kernels for {WITH_PARAMETERS}, ungated relu2"
    ]


def test_only_silu_has_parameters():
    text = "silu(alpha=1.702,beta=1,limit=7)"
    assert epilogue(text, True) == "Swiglu" and epilogue("silu(alpha=2)", False) is None
    for format in ("nvfp4", "mxfp8", "mxfp4", "fp8_block"):
        assert reasons(text, True, 2880, 2880, format) == []
        assert size_multiples(text, True, 128, format) == size_multiples("silu", True, 128, format)
    # 0.6.13's entry for it has no such arguments.
    assert reasons(text, True, 2880, 2880, "fp8") == [
        f"no fp8 kernel for gated {text}; there are kernels for gated silu, ungated relu2"
    ]
    refused = ("gelu_tanh(limit=7)", "gelu(beta=1)", "silu_step(limit=7)")
    for other in (*refused, "silu_softcap(alpha=4,beta=25)"):
        assert reasons(other, True, 2816, 704) == [
            f"no nvfp4 kernel for gated {other}; there are kernels for {FORMS_OF_NVFP4}"
        ]
        with pytest.raises(UnsupportedError, match="must be one of gated silu"):
            size_multiples(other, True)


@pytest.mark.parametrize("format", FORMATS)
def test_with_padding_every_size_has_a_kernel(format):
    for (activation, gated), name in ACTIVATION_NAMES.items():
        if (format, name) not in {(rule.format, rule.epilogue) for rule in SHAPE_RULES}:
            assert reasons(activation, gated, 128, 128, format) != []
            continue
        for sizes in ((1, 1), (2880, 720), (2689, 1857)):
            assert reasons(activation, gated, *sizes, format) == []
            for alignment in (128, 256, 512):
                multiples = size_multiples(activation, gated, alignment, format)
                padded = [-(-s // m) * m for s, m in zip(sizes, multiples, strict=True)]
                assert padded[0] % alignment == 0
                # Few tokens take the smallest tile.
                assert 8 in token_tiles(format, name, *padded)


def test_the_reason_without_padding_by_text():
    assert reasons("silu", True, 2880, 720, padded=False) == [
        "no kernel for hidden_size 2880 x intermediate_size 720 at exactly this size; the next "
        "size with one is 2944 x 768"
    ]
    assert reasons("relu2", False, 2688, 1856, padded=False) == [
        "no kernel for hidden_size 2688 x intermediate_size 1856 at exactly this size; the next "
        "size with one is 2688 x 1920"
    ]
    assert reasons("gelu_tanh", True, 2816, 704, padded=False) == []


def next_size(format, name, hidden_size, intermediate_size):
    """The least padded size with the smallest tile, by trying every multiple of 16."""
    start = [-(-size // 16) * 16 for size in (hidden_size, intermediate_size)]
    found = [
        (hidden, intermediate)
        for hidden in range(start[0], start[0] + 512, 16)
        for intermediate in range(start[1], start[1] + 512, 16)
        if 8 in token_tiles(format, name, hidden, intermediate)
    ]
    least = min(h for h, _ in found), min(i for _, i in found)
    assert least in found  # both numbers are least at once
    return least


@pytest.mark.parametrize("sizes", [(2880, 720), (1, 1), (129, 65), (2688, 1856), (2047, 2049)])
@pytest.mark.parametrize("rule", SHAPE_RULES, ids=lambda r: f"{r.format}-{r.epilogue}")
def test_the_next_size_is_the_least_one(rule, sizes):
    form = next(form for form, name in ACTIVATION_NAMES.items() if name == rule.epilogue)
    found = reasons(*form, *sizes, rule.format, padded=False)
    least = next_size(rule.format, rule.epilogue, *sizes)
    if least == sizes:
        assert found == []
    else:
        assert found[0].endswith(f"the next size with one is {least[0]} x {least[1]}")


def test_size_multiples():
    assert min(rule.hidden_multiple for rule in SHAPE_RULES) == min(HIDDEN_ALIGNMENTS) == 128
    assert size_multiples("silu", True) == (256, 64)
    assert size_multiples("gelu_tanh", True, 128) == (128, 64)
    assert size_multiples("relu2", False, 512) == (512, 128)
    for format in ("mxfp8", "mxfp4"):
        assert size_multiples("silu", True, 128, format) == (256, 128)
        assert size_multiples("relu2", False, 512, format) == (512, 128)
    assert size_multiples("silu", True, 128, "fp8") == (128, 64)
    assert size_multiples("relu2", False, 128, "fp8") == (128, 128)
    assert size_multiples("silu", True, 128, "fp8_block") == (128, 128)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: token_tiles("fp4", "Swiglu", 128, 128),
            UnsupportedError,
            "token_tiles: format must be one of nvfp4, fp8, fp8_block, mxfp8, mxfp4, "
            "mxfp4_w4a16; got 'fp4'. Pass one of these names.",
        ),
        (
            lambda: reasons("silu", True, 128, 128, "fp4"),
            UnsupportedError,
            "reasons: format must be one of nvfp4, fp8, fp8_block, mxfp8, mxfp4, "
            "mxfp4_w4a16; got 'fp4'. Pass one of these names.",
        ),
        (
            lambda: token_tiles("nvfp4", "silu", 128, 128),
            UnsupportedError,
            "token_tiles: activation must be one of Swiglu, Geglu, Relu2; got 'silu'. Pass the "
            "name that epilogue() returns.",
        ),
        (
            lambda: token_tiles("nvfp4", "Swiglu", 0, 128),
            ShapeError,
            "token_tiles: hidden_size must be at least 1; got 0. Pass the size of the layer.",
        ),
        (
            lambda: reasons("silu", True, 128, -64, padded=False),
            ShapeError,
            "reasons: intermediate_size must be at least 1; got -64. Pass the size of the layer.",
        ),
        (
            lambda: size_multiples("silu", True, 64),
            ShapeError,
            "size_multiples: hidden_alignment must be one of 128, 256, 512; got 64. Pass one of "
            "these.",
        ),
        (
            lambda: size_multiples("relu2", True),
            UnsupportedError,
            f"size_multiples: activation must be one of {FORMS_OF_NVFP4}; got gated relu2. Use "
            "another kernel.",
        ),
        (
            lambda: routing_reasons("Softmax", 128, 8),
            UnsupportedError,
            "routing_tiers: method must be one of Default, TopK, Sigmoid, SigmoidRenorm, "
            "Renormalize, RenormalizeNaive, DeepSeekV3, MiniMax2, Llama4, TopKSigmoid; got "
            "'Softmax'. Pass one of these names.",
        ),
        (
            lambda: routing_reasons("Default", 128, 0),
            ShapeError,
            "routing_reasons: top_k must be at least 1; got 0. Pass the size of the layer.",
        ),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("method", "num_experts", "top_k", "groups"),
    [
        ("Renormalize", 128, 8, (1, 1)),  # Gemma4, Qwen3
        ("RenormalizeNaive", 160, 10, (1, 1)),
        ("DeepSeekV3", 128, 6, (1, 1)),  # Nemotron 3 Nano
        ("DeepSeekV3", 512, 22, (1, 1)),  # Nemotron 3 Super
        ("DeepSeekV3", 513, 32, (1, 1)),
        ("DeepSeekV3", 256, 8, (8, 4)),  # DeepSeek-V3
        ("MiniMax2", 256, 8, (1, 1)),
        ("Llama4", 128, 1, (1, 1)),
        ("Renormalize", 2048, 32, (1, 1)),
        ("Renormalize", 33, 32, (1, 1)),
        ("Default", 256, 8, (1, 1)),
        ("DeepSeekV3", 16, 6, (8, 3)),
    ],
)
def test_routing_that_works(method, num_experts, top_k, groups, newer):
    assert routing_reasons(method, num_experts, top_k, *groups, newer) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("Default", 160, 10),
            "routing method Default has kernels up to num_experts 256 and top_k 8, got 160 and 10",
        ),
        (
            ("Sigmoid", 257, 8),
            "routing method Sigmoid has kernels up to num_experts 256 and top_k 8, got 257 and 8",
        ),
        (
            ("Renormalize", 128, 33),
            "routing method Renormalize has kernels up to num_experts 2048 and top_k 32, got 128 "
            "and 33",
        ),
        (
            ("MiniMax2", 1025, 8),
            "routing method MiniMax2 has kernels up to num_experts 1024 and top_k 32, got 1025 "
            "and 8",
        ),
        (
            ("Llama4", 129, 1),
            "routing method Llama4 has kernels up to num_experts 128 and top_k 1, got 129 and 1",
        ),
        (("TopK", 4, 5), "top_k must not exceed num_experts = 4, got 5"),
        (
            ("Renormalize", 256, 8, 8, 4),
            "routing method Renormalize ignores top_groups 4 of num_groups 8; only DeepSeekV3 with "
            "two groups or more has them",
        ),
        (
            ("DeepSeekV3", 256, 8, 1, 4),
            "routing method DeepSeekV3 ignores top_groups 4 of num_groups 1; only DeepSeekV3 with "
            "two groups or more has them",
        ),
        (
            ("DeepSeekV3", 252, 8, 8, 4),
            "num_experts must be a multiple of num_groups = 8, got 252",
        ),
        (
            ("DeepSeekV3", 256, 8, 16, 4),
            "routing method DeepSeekV3 with groups: num_groups must be 2 to 8, got 16",
        ),
        (
            ("DeepSeekV3", 288, 8, 8, 4),
            "routing method DeepSeekV3 with groups: num_experts / num_groups must be 2 to 32, got "
            "36",
        ),
        (
            ("DeepSeekV3", 8, 1, 8, 4),
            "routing method DeepSeekV3 with groups: num_experts / num_groups must be 2 to 32, got "
            "1",
        ),
        (
            ("DeepSeekV3", 256, 8, 8, 5),
            "routing method DeepSeekV3 with groups: top_groups must be 1 to 4, got 5",
        ),
        (
            ("DeepSeekV3", 64, 8, 2, 3),
            "routing method DeepSeekV3 with groups: top_groups must be 1 to 2, got 3",
        ),
        (
            ("DeepSeekV3", 256, 23, 8, 4),
            "routing method DeepSeekV3 with groups: top_k must be 1 to 22, got 23",
        ),
        (
            ("DeepSeekV3", 64, 9, 8, 1),
            "routing method DeepSeekV3 with groups: top_k must be 1 to 8, got 9",
        ),
    ],
)
@pytest.mark.parametrize("newer", [False, True])
def test_routing_that_does_not(arguments, text, newer):
    assert routing_reasons(*arguments, newer=newer) == [text]


def test_what_newer_versions_changed():
    assert routing_reasons("TopKSigmoid", 128, 8) == [
        "routing method TopKSigmoid needs FlashInfer 0.7 or newer"
    ]
    assert routing_reasons("TopKSigmoid", 128, 8, newer=True) == []
    assert routing_reasons("DeepSeekV3", 62, 8, 2, 1) == []
    assert routing_reasons("DeepSeekV3", 62, 8, 2, 1, True) == [
        "num_experts must be a multiple of 4 with groups, got 62"
    ]


def tier(method, num_experts, top_k, newer):
    return next(t for t in routing_tiers(method, newer) if num_experts <= t[0] and top_k <= t[1])


@pytest.mark.parametrize(
    ("method", "num_experts", "top_k", "older", "newer"),
    [
        ("Renormalize", 128, 8, (128, 8), (128, 8)),
        ("Renormalize", 160, 10, (256, 16), (256, 16)),
        ("Renormalize", 128, 22, (512, 22), (512, 22)),
        ("RenormalizeNaive", 512, 24, (2048, 32), (512, 32)),
        ("DeepSeekV3", 128, 6, (128, 8), (128, 8)),
        ("DeepSeekV3", 512, 22, (512, 22), (512, 22)),
        ("MiniMax2", 640, 16, (1024, 32), (896, 16)),
    ],
)
def test_a_large_top_k_takes_the_next_tier(method, num_experts, top_k, older, newer):
    assert tier(method, num_experts, top_k, False) == older
    assert tier(method, num_experts, top_k, True) == newer


def test_the_last_tier_holds_all_others():
    for method in ROUTING_TIERS:
        tiers = routing_tiers(method, True)
        assert tiers[-1] == tuple(map(max, zip(*tiers, strict=True)))
        assert routing_tiers(method) == list(ROUTING_TIERS[method])
        assert len(set(tiers)) == len(tiers)


SPEC = importlib.util.find_spec("flashinfer")
LIBRARY = pathlib.Path(SPEC.submodule_search_locations[0]) if SPEC else pathlib.Path()
needs_flashinfer = pytest.mark.skipif(SPEC is None, reason="needs flashinfer-python's sources")


def release():
    """The installed library's first three numbers."""
    version = importlib.metadata.version("flashinfer-python")
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def library_is_newer():
    return release() >= NEWER_TIERS_SINCE[:3]


def source(pattern):
    """The text of the library's sources whose path fits, one after another."""
    files = sorted((LIBRARY / "data").glob(pattern))
    assert files, f"no {pattern} in {LIBRARY}"
    return "\n".join(file.read_text("utf-8") for file in files)


POLICIES = {
    "Default": "SoftmaxPreprocess, NoOpPostprocess",
    "Renormalize": "NoOpPreprocess, SoftmaxPostprocess",
    "DeepSeekV3": "SigmoidBiasPreprocess, ScaledSumNormalizePostprocess",
    "RenormalizeNaive": "NoOpPreprocess, SoftmaxPostprocess",
    "TopK": "NoOpPreprocess, NoOpPostprocess",
    "SigmoidRenorm": "SigmoidPreprocess, SumNormalizePostprocess",
    "MiniMax2": "SigmoidBiasPreprocess, ScaledSumNormalizePostprocess",
    "Sigmoid": "SigmoidPreprocess, SumNormalizePostprocess",
    "TopKSigmoid": "NoOpPreprocess, SigmoidPostprocess",
}


@needs_flashinfer
def test_tiers_are_those_of_the_installed_library():
    text = source("include/flashinfer/trtllm/fused_moe/RoutingCustomPolicy.cuh")
    newer, known = library_is_newer(), enum_names()["RoutingMethodType"]
    for method, policy in POLICIES.items():
        if method not in known:
            assert method == "TopKSigmoid"  # since 0.6.18
            continue
        (listed,) = re.findall(
            rf"struct PolicyTraits<{policy}> \{{\s*using Pairs = TierList<(.*?)>;", text, re.DOTALL
        )
        found = [(int(e), int(k)) for e, k in re.findall(r"Tier<(\d+), (\d+)>", listed + ">")]
        assert found == routing_tiers(method, newer), method


@needs_flashinfer
def test_limits_of_groups_and_llama4_are_those_of_the_installed_library():
    folder = "csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing"
    deepseek, llama4 = source(f"{folder}_deepseek.cu"), source(f"{folder}_llama4.cu")
    number = {
        name: int(value)
        for name, value in re.findall(r"^static constexpr int (\w+) = (\d+);", deepseek, re.M)
    }
    assert (number["MaxNumGroups"], number["MaxNumTopGroups"]) == (8, 4)
    assert "data.mNumExperts / data.mNumExpertGroups <= WarpSize" in deepseek
    assert ("data.mNumExperts % 4 == 0" in deepseek) == library_is_newer()
    assert "static constexpr int MaxSupportedExperts = 128;" in llama4
    # It has a file of its own in 0.7.
    own = LIBRARY / "data/csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_runner.cu"
    runner = str(own.relative_to(LIBRARY / "data")) if own.exists() else "csrc/*moe_runner.cu"
    assert re.findall(r"FLASHINFER_CHECK\(topK (.. \d+),", source(runner)) == ["<= 22", "== 1"]


def enum_names():
    """The members of each enum of the installed library."""
    tree = ast.parse((LIBRARY / "tllm_enums.py").read_text("utf-8"))
    return {
        node.name: {
            target.id
            for line in node.body
            if isinstance(line, ast.Assign)
            for target in line.targets
            if isinstance(target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


@needs_flashinfer
def test_names_are_those_of_the_installed_library():
    names = enum_names()
    assert set(ACTIVATION_NAMES.values()) <= names["ActivationType"]
    methods = {method for method in ROUTING_TIERS if routing_tiers(method, library_is_newer())}
    missing = methods ^ names["RoutingMethodType"]
    assert missing - {"TopKSigmoid"} == {"Unspecified"}
    assert ("TopKSigmoid" in missing) == (library_is_newer() and release() < (0, 6, 18))
