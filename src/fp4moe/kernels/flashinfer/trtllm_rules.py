"""What TRT-LLM-Gen can run, as data: activations, sizes, token tiles, and routing methods.

Sizes: the rule behind the kernel manifest of flashinfer-cubin 0.6.13, each row of which is a test
(`tests/data/README.md`). Routing: what the library accepts, from the C++ sources of FlashInfer
0.6.13 and 0.7.2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

from ...activations import get_activation
from ...errors import UnsupportedError, must
from ...layer import HIDDEN_ALIGNMENTS

__all__ = ["ACTIVATION_NAMES", "FORMATS", "NEWER_TIERS", "NEWER_TIERS_SINCE", "ROUTING_TIERS"]
__all__ += ["SHAPE_RULES", "ShapeRule", "block_routing_reasons", "epilogue", "reasons"]
__all__ += ["routing_reasons", "routing_tiers", "size_multiples", "token_tiles"]

# The last one has bfloat16 activations.
FORMATS = ("nvfp4", "fp8", "fp8_block", "mxfp8", "mxfp4", "mxfp4_w4a16")

# (our activation, gated) -> name in the library's ActivationType. Never its number: numbers moved
# between 0.6.13 and 0.7.2. There is one Geglu: the tanh form, says 0.6.13's machine code; erf
# differs from it by at most 4.7e-4. GegluTanh is refused.
ACTIVATION_NAMES: Mapping[tuple[str, bool], str] = MappingProxyType(
    {
        ("silu", True): "Swiglu",
        ("gelu_tanh", True): "Geglu",
        ("gelu", True): "Geglu",
        ("relu2", False): "Relu2",
    }
)


@dataclasses.dataclass(frozen=True)
class ShapeRule:
    """Which sizes have kernels for both GEMMs, in one format with one epilogue.

    Attributes:
        format, epilogue: one of FORMATS, and a value of ACTIVATION_NAMES.
        intermediate_multiple: what intermediate_size must be a multiple of.
        hidden_multiples: token tile -> what hidden_size must be a multiple of for that tile.
        parameters: whether some version of the library takes alpha, beta and limit with it.
    """

    format: str
    epilogue: str
    intermediate_multiple: int
    hidden_multiples: Mapping[int, int]
    parameters: bool = False

    @property
    def hidden_multiple(self) -> int:
        """What hidden_size must be a multiple of for the smallest tile, which few tokens take."""
        return self.hidden_multiples[min(self.hidden_multiples)]

    def tiles(self, hidden_size: int, intermediate_size: int) -> tuple[int, ...]:
        """Return the token tiles with kernels at exactly this size, smallest first."""
        if intermediate_size % self.intermediate_multiple:
            return ()
        return tuple(t for t, m in self.hidden_multiples.items() if hidden_size % m == 0)


_NVFP4 = MappingProxyType({8: 128, 16: 128, 32: 128, 64: 128, 128: 128, 256: 256})
_FP8 = MappingProxyType(dict.fromkeys((8, 16, 32, 64, 128, 192, 256), 128))
_FP8_BLOCK = MappingProxyType(dict.fromkeys((8, 16, 32, 64, 128), 128))
# Few tokens choose a small tile: hidden_size should be a multiple of 256 here.
_MXFP4_W4A16 = MappingProxyType(dict.fromkeys((8, 16, 32, 64, 128), 256))
_MXFP8 = MappingProxyType({8: 256, 16: 256, 32: 256, 64: 128, 128: 128, 256: 128})

SHAPE_RULES: tuple[ShapeRule, ...] = (
    ShapeRule("nvfp4", "Swiglu", 64, _NVFP4, parameters=True),
    ShapeRule("nvfp4", "Geglu", 64, _NVFP4),
    ShapeRule("nvfp4", "Relu2", 128, _NVFP4),
    ShapeRule("fp8", "Swiglu", 64, _FP8),
    ShapeRule("fp8", "Relu2", 128, _FP8),
    ShapeRule("fp8_block", "Swiglu", 128, _FP8_BLOCK, parameters=True),
    ShapeRule("mxfp8", "Swiglu", 128, _MXFP8, parameters=True),
    ShapeRule("mxfp8", "Relu2", 128, _MXFP8),
    ShapeRule("mxfp4", "Swiglu", 128, _MXFP8, parameters=True),
    ShapeRule("mxfp4", "Relu2", 128, _MXFP8),
    ShapeRule("mxfp4_w4a16", "Swiglu", 128, _MXFP4_W4A16, parameters=True),
)


def epilogue(activation: str, gated: bool) -> str | None:
    """Return the name in the library's ActivationType, None where no kernel computes it.

    Args:
        activation: name or text; which formats take its parameters, say the rules.
    """
    return ACTIVATION_NAMES.get((get_activation(activation).name, gated))


def token_tiles(
    format: str, activation: str, hidden_size: int, intermediate_size: int
) -> tuple[int, ...]:
    """Return the token tiles for which both GEMMs have a kernel at exactly this size.

    Args:
        format: one of FORMATS.
        activation: a value of ACTIVATION_NAMES, in any case.
        hidden_size, intermediate_size: elements, as padded.

    Returns ascending tile sizes in tokens, empty where the library would find no configuration.
    Raises UnsupportedError for an unknown format or activation, ShapeError for a size below 1.
    """
    known = {name.lower(): name for name in ACTIVATION_NAMES.values()}
    if activation.lower() not in known:
        must(
            "token_tiles: activation",
            f"be one of {', '.join(known.values())}",
            repr(activation),
            "Pass the name that epilogue() returns.",
            error=UnsupportedError,
        )
    _check_sizes("token_tiles", hidden_size=hidden_size, intermediate_size=intermediate_size)
    name = known[activation.lower()]
    rule = next((r for r in _rules("token_tiles", format) if r.epilogue == name), None)
    return rule.tiles(hidden_size, intermediate_size) if rule else ()


def size_multiples(
    activation: str, gated: bool, hidden_alignment: int = 256, format: str = "nvfp4"
) -> tuple[int, int]:
    """Return the multiples that (hidden_size, intermediate_size) are zero-padded to.

    Args:
        activation, gated, format: as in Layer, and one of FORMATS.
        hidden_alignment: 128, 256 (every tile of every format) or 512; not below what the smallest
            tile takes.

    Raises ShapeError for another alignment, UnsupportedError where no size has a kernel.
    """
    if hidden_alignment not in HIDDEN_ALIGNMENTS:
        must(
            "size_multiples: hidden_alignment",
            f"be one of {str(HIDDEN_ALIGNMENTS)[1:-1]}",
            hidden_alignment,
            "Pass one of these.",
        )
    rule = _find_rule("size_multiples", format, activation, gated)
    if rule is None:
        must(
            "size_multiples: activation",
            f"be one of {_supported(format)}",
            _form(activation, gated),
            "Use another kernel.",
            error=UnsupportedError,
        )
    return max(hidden_alignment, rule.hidden_multiple), rule.intermediate_multiple


def reasons(
    activation: str,
    gated: bool,
    hidden_size: int,
    intermediate_size: int,
    format: str = "nvfp4",
    padded: bool = True,
) -> list[str]:
    """Return why no kernel runs experts of this activation and size; empty where one does.

    Args:
        activation, gated, hidden_size, intermediate_size: as in Layer.
        format: one of FORMATS.
        padded: whether zero padding is allowed, which makes every size possible.

    Raises UnsupportedError for an unknown format, ShapeError for a size below 1 without padding.
    """
    rule = _find_rule("reasons", format, activation, gated)
    if rule is None:
        return [
            f"no {format} kernel for {_form(activation, gated)}; there are kernels for "
            f"{_supported(format)}"
        ]
    if padded:
        return []
    _check_sizes("reasons", hidden_size=hidden_size, intermediate_size=intermediate_size)
    if min(rule.hidden_multiples) in rule.tiles(hidden_size, intermediate_size):
        return []
    hidden = -(-hidden_size // rule.hidden_multiple) * rule.hidden_multiple
    intermediate = -(-intermediate_size // rule.intermediate_multiple) * rule.intermediate_multiple
    return [
        f"no kernel for hidden_size {hidden_size} x intermediate_size {intermediate_size} at "
        f"exactly this size; the next size with one is {hidden} x {intermediate}"
    ]


# (num_experts, top_k) up to which a routing kernel is compiled; the first that fits runs, so that a
# large top_k takes a tier of more experts. A miss raises in 0.7; in 0.6.13 it only warns, and the
# ids stay unwritten. By names of the library's RoutingMethodType, whose numbers moved too.
Tiers = tuple[tuple[int, int], ...]
_SMALL = ((128, 8), (256, 8))
_TOPK_SOFTMAX: Tiers = ((128, 4), (128, 8), (160, 8), (256, 8), (256, 16), (512, 8), (512, 16))
_TOPK_SOFTMAX += ((512, 22), (576, 8), (2048, 32))
_TOPK_SOFTMAX_NEWER = ((512, 32), (768, 32), (896, 16), (1024, 32))
_SIGMOID_BIAS = ((128, 8), (256, 8), (384, 8), (512, 8), (512, 22), (1024, 32))
_SIGMOID_BIAS_NEWER = ((896, 16),)

ROUTING_TIERS: Mapping[str, Tiers] = MappingProxyType(
    {
        **dict.fromkeys(("Default", "TopK", "Sigmoid", "SigmoidRenorm"), _SMALL),
        **dict.fromkeys(("Renormalize", "RenormalizeNaive"), _TOPK_SOFTMAX),
        **dict.fromkeys(("DeepSeekV3", "MiniMax2"), _SIGMOID_BIAS),
        "Llama4": ((128, 1),),
        "TopKSigmoid": (),
    }
)
# 0.6.15 has these but (896, 16), whose place a larger one takes, and TopKSigmoid: 0.6.16, 0.6.18.
NEWER_TIERS_SINCE = (0, 6, 15, 0)
NEWER_TIERS: Mapping[str, Tiers] = MappingProxyType(
    {
        **dict.fromkeys(("Renormalize", "RenormalizeNaive"), _TOPK_SOFTMAX_NEWER),
        **dict.fromkeys(("DeepSeekV3", "MiniMax2"), _SIGMOID_BIAS_NEWER),
        "TopKSigmoid": _SMALL,
    }
)


def routing_tiers(method: str, newer: bool = False) -> list[tuple[int, int]]:
    """Return the compiled (num_experts, top_k) of a method without groups, as they are tried.

    Raises UnsupportedError for a name that neither version has.
    """
    if method not in ROUTING_TIERS:
        must(
            "routing_tiers: method",
            f"be one of {', '.join(ROUTING_TIERS)}",
            repr(method),
            "Pass one of these names.",
            error=UnsupportedError,
        )
    added = NEWER_TIERS.get(method, ()) if newer else ()
    return sorted(ROUTING_TIERS[method] + added)


def routing_reasons(
    method: str,
    num_experts: int,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    newer: bool = False,
) -> list[str]:
    """Return why the library cannot route like this; empty where it can.

    Args:
        method: a name of RoutingMethodType; "Renormalize" also bounds ids that the caller chose.
        num_experts, top_k: of the whole layer.
        num_groups, top_groups: groups of experts and how many stay per token, DeepSeekV3 only.
        newer: FlashInfer 0.6.15 or newer; else the limits of 0.6.13.

    Raises UnsupportedError for an unknown method, ShapeError for a number below 1.
    """
    _check_sizes("routing_reasons", num_experts=num_experts, top_k=top_k)
    _check_sizes("routing_reasons", num_groups=num_groups, top_groups=top_groups)
    tiers = routing_tiers(method, newer)
    if not tiers:
        return [f"routing method {method} needs FlashInfer 0.7 or newer"]
    if top_k > num_experts:
        return [f"top_k must not exceed num_experts = {num_experts}, got {top_k}"]
    if num_groups > 1 and method == "DeepSeekV3":
        found = _group_reasons(num_experts, top_k, num_groups, top_groups)
        if newer and num_experts % 4:
            found.append(f"num_experts must be a multiple of 4 with groups, got {num_experts}")
        return found
    found = []
    if num_groups > 1 or top_groups > 1:
        found.append(
            f"routing method {method} ignores top_groups {top_groups} of num_groups {num_groups}; "
            "only DeepSeekV3 with two groups or more has them"
        )
    if not any(num_experts <= experts and top_k <= k for experts, k in tiers):
        # The last tier is the largest in both.
        found.append(
            f"routing method {method} has kernels up to num_experts {tiers[-1][0]} and top_k "
            f"{tiers[-1][1]}, got {num_experts} and {top_k}"
        )
    return found


# The FP8 functions with block scales have limits of their own on top, in both versions: experts in
# fours, more of them than a token takes, and with a bias (num_experts, top_k) up to these.
BLOCK_EXPERTS = 4
BLOCK_BIASED_TOP_K = ((384, 8), (2048, 22))


def block_routing_reasons(
    method: str, num_experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1
) -> list[str]:
    """Return why the FP8 functions with block scales refuse what `routing_reasons` allows."""
    found = []
    if num_experts % BLOCK_EXPERTS:
        found.append(f"num_experts must be a multiple of {BLOCK_EXPERTS}, got {num_experts}")
    kept = num_experts
    if method == "DeepSeekV3":
        kept = num_experts * top_groups // num_groups
        most = next((k for experts, k in BLOCK_BIASED_TOP_K if num_experts <= experts), 22)
        if top_k > most:
            found.append(
                f"top_k must not exceed {most} for {num_experts} experts with a bias, got {top_k}"
            )
    if top_k >= kept:
        found.append(f"top_k must be below the {kept} experts to choose from, got {top_k}")
    return found


def _group_reasons(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> list[str]:
    """Return why DeepSeekV3 cannot route with these groups."""
    if num_experts % num_groups:
        return [f"num_experts must be a multiple of num_groups = {num_groups}, got {num_experts}"]
    per_group = num_experts // num_groups
    top_groups_limit = min(4, num_groups)
    bounds = (
        ("num_groups", num_groups, 2, 8),
        # One warp scores a group, by the sum of its two best.
        ("num_experts / num_groups", per_group, 2, 32),
        ("top_groups", top_groups, 1, top_groups_limit),
        # Unchecked by the library: beyond the groups that stay it would choose masked experts.
        ("top_k", top_k, 1, min(22, min(top_groups, top_groups_limit) * per_group)),
    )
    return [
        f"routing method DeepSeekV3 with groups: {name} must be {low} to {high}, got {value}"
        for name, value, low, high in bounds
        if not low <= value <= high
    ]


@functools.lru_cache(maxsize=1024)
def _find_rule(caller: str, format: str, activation: str, gated: bool) -> ShapeRule | None:
    name, plain = epilogue(activation, gated), get_activation(activation).plain
    for rule in _rules(caller, format):
        if rule.epilogue == name and (plain or rule.parameters):
            return rule
    return None


def _rules(caller: str, format: str) -> list[ShapeRule]:
    if format not in FORMATS:
        must(
            f"{caller}: format",
            f"be one of {', '.join(FORMATS)}",
            repr(format),
            "Pass one of these names.",
            error=UnsupportedError,
        )
    return [rule for rule in SHAPE_RULES if rule.format == format]


def _supported(format: str) -> str:
    more = {rule.epilogue: rule.parameters for rule in SHAPE_RULES if rule.format == format}
    return ", ".join(
        _form(*key) + " (also with alpha, beta and limit)" * more[name]
        for key, name in ACTIVATION_NAMES.items()
        if name in more
    )


def _form(activation: str, gated: bool) -> str:
    return f"{'gated' if gated else 'ungated'} {activation}"


def _check_sizes(caller: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            must(f"{caller}: {name}", "be at least 1", size, "Pass the size of the layer.")
