"""FlashInfer as it is installed: its version, enums by name, functions and the arguments they take.

Decides: which versions are refused, when routing weights may be float32, what is imported (on first
use only). Not here: layouts and calls, see trtllm.py and cutlass.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...borrowed import Borrowed
from ...errors import UnsupportedError, must, refuse
from ...version import installed

__all__ = [
    "FlashInfer",
    "FlashInferSettings",
    "flashinfer_settings",
    "is_tuning",
    "library",
    "library_reasons",
    "set_flashinfer",
    "tuning",
]

PACKAGE, CUBINS = "flashinfer-python", "flashinfer-cubin"
# The oldest version whose sources were read, and versions that are refused: [from, below), why.
OLDEST = (0, 6, 13, 0)
REFUSED = (
    (
        (0, 6, 16, 4),
        (0, 6, 18, 0),
        "its NVFP4 experts return NaN with token tile 192 (flashinfer issue 4486)",
    ),
)
# flashinfer pull request 3763: before it, float32 weights are misread as bfloat16.
FLOAT32_WEIGHTS = (0, 6, 18, 0)
# 0.6.13 tunes on random packed ids, (id << 16) | weight, even where it is called with plain ids:
# all of them lie outside the experts, and it times empty work.
TUNES_PLAIN_IDS = FLOAT32_WEIGHTS
QUANTISERS = ("fp4_quantize", "mxfp8_quantize")
GEMMS = ("mm_fp4",)
EXPERTS = (
    *("trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"),
    *("trtllm_fp8_block_scale_routed_moe", "trtllm_fp8_block_scale_moe"),
    # The first of these is missing in 0.6.13.
    *("trtllm_fp8_per_tensor_scale_routed_moe", "trtllm_fp8_per_tensor_scale_moe"),
    "cutlass_fused_moe",
)
INSTALL = "pip install 'flashinfer-python==0.6.13' 'flashinfer-cubin==0.6.13'"


@dataclasses.dataclass(frozen=True)
class FlashInferSettings:
    """What changes the speed of FlashInfer's kernels, never their numbers.

    Attributes:
        enable_pdl: programmatic dependent launch; None lets the library choose.
        tune_max_num_tokens: the largest token count that the tuner distinguishes; a power of two.
    """

    enable_pdl: bool | None = None
    tune_max_num_tokens: int = 8192


_settings = FlashInferSettings()


def flashinfer_settings() -> FlashInferSettings:
    """Return the settings of this process."""
    return _settings


def set_flashinfer(
    *, enable_pdl: bool | None = None, tune_max_num_tokens: int = 8192
) -> FlashInferSettings:
    """Set both settings for this process and return the previous ones.

    Both change speed only. Call this before `fp4moe.autotune`: a tuned choice belongs to one
    tune_max_num_tokens.

    Args:
        enable_pdl: whether a kernel may start before the one in front of it has ended; None lets
            FlashInfer choose.
        tune_max_num_tokens: the largest batch that the tuner measures, a power of two.

    Raises:
        UnsupportedError: tune_max_num_tokens is no power of two, or enable_pdl no bool or None.
    """
    global _settings
    if enable_pdl not in (None, True, False):
        must(
            "set_flashinfer: enable_pdl",
            "be None, True or False",
            repr(enable_pdl),
            "Pass None to let FlashInfer choose.",
            error=UnsupportedError,
        )
    tokens = tune_max_num_tokens
    if not isinstance(tokens, int) or tokens < 1 or tokens & (tokens - 1):
        must(
            "set_flashinfer: tune_max_num_tokens",
            "be a power of two",
            repr(tokens),
            "Pass the next power of two above the largest batch, 8192 at most where not tested.",
            error=UnsupportedError,
        )
    previous, _settings = _settings, FlashInferSettings(enable_pdl, tokens)
    return previous


_tuning = Borrowed(lambda: None, lambda before: None)


@contextlib.contextmanager
def tuning(**arguments: Any) -> Iterator[None]:
    """Let FlashInfer's tuner measure what is called inside; arguments of flashinfer.autotune."""
    with _tuning.borrow(), torch.no_grad(), library().module.autotune(True, **arguments):
        yield


def is_tuning() -> bool:
    """Whether a call happens inside `tuning`."""
    return _tuning.borrowers > 0


@dataclasses.dataclass(frozen=True)
class FlashInfer:
    """The imported library.

    Attributes:
        version: of flashinfer-python.
        module: `flashinfer`; functions are looked up in it at each call.
        float32_weights: whether the routed entry reads float32 routing weights.
        tunes_plain_ids: whether the tuner may see ids and weights apart.
        arguments: names of the arguments of each function that is called and that it has.
        activation_names: members of its ActivationType.
    """

    version: str
    module: Any
    float32_weights: bool
    tunes_plain_ids: bool
    arguments: dict[str, frozenset[str]]
    activation_names: frozenset[str]

    def function(self, name: str) -> Callable:
        """Return a function of `flashinfer.fused_moe`, or one that quantises or multiplies."""
        plain = name in (*QUANTISERS, *GEMMS)
        return getattr(self.module if plain else self.module.fused_moe, name)

    def call(self, name: str, optional: dict[str, Any], **arguments: Any) -> Any:
        """Call a function by keywords, with those of `optional` that this version takes."""
        known = self.arguments[name]
        arguments.update((k, v) for k, v in optional.items() if k in known)
        return self.function(name)(**arguments)

    def activation(self, name: str) -> int:
        """Return the value of an ActivationType by its name: values differ between versions."""
        return int(self.module.ActivationType[name].value)

    def routing_method(self, name: str) -> int:
        """Return the value of a RoutingMethodType by its name."""
        return int(self.module.RoutingMethodType[name].value)

    def fp8_quantization(self, name: str) -> Any:
        """Return a Fp8QuantizationType by its name."""
        return self.module.fused_moe.Fp8QuantizationType[name]

    def linear_scale_layout(self) -> Any:
        """Return SfLayout.layout_linear."""
        return self.module.SfLayout.layout_linear


def version_key(version: str) -> tuple[int, int, int, int]:
    """Return (major, minor, patch, post) of a version such as 0.7.2.post1."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?", version)
    if match is None:
        must(
            "flashinfer-python: version",
            "look like 0.6.13 or 0.7.2.post1",
            repr(version),
            "Install a released version.",
            error=UnsupportedError,
        )
    major, minor, patch, post = (int(part or 0) for part in match.groups())
    return major, minor, patch, post


def library_reasons() -> tuple[str, ...]:
    """Return why the installed FlashInfer cannot be used, from package metadata alone."""
    version = installed(PACKAGE)
    if version is None:
        return (f"{PACKAGE} is not installed; run {INSTALL}",)
    key = version_key(version)
    if key < OLDEST:
        return (f"{PACKAGE} {version} is older than 0.6.13, the oldest known; run {INSTALL}",)
    reasons = [
        f"{PACKAGE} {version} is refused: {why}; run {INSTALL}"
        for first, last, why in REFUSED
        if first <= key < last
    ]
    cubins = installed(CUBINS)
    if cubins is not None and cubins != version:
        reasons.append(
            f"{CUBINS} {cubins} does not belong to {PACKAGE} {version}; install equal versions or "
            f"uninstall {CUBINS}"
        )
    return tuple(reasons)


# Dynamo cannot follow package metadata. Its decorator would import it with this package.
library_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def library() -> FlashInfer:
    """Import FlashInfer.

    Raises:
        UnsupportedError: it is missing, too old or refused; lists the reasons.
    """
    reasons = library_reasons()
    if reasons:
        refuse(
            "moe",
            "the installed FlashInfer cannot be used",
            "; ".join(reasons),
            "See fp4moe.why_not.",
        )
    import flashinfer
    import flashinfer.fused_moe

    version = flashinfer.__version__.partition("+")[0]
    functions = {name: getattr(flashinfer, name) for name in (*QUANTISERS, *GEMMS)}
    experts = flashinfer.fused_moe
    functions |= {name: getattr(experts, name) for name in EXPERTS if hasattr(experts, name)}
    return FlashInfer(
        version=version,
        module=flashinfer,
        float32_weights=version_key(version) >= FLOAT32_WEIGHTS,
        tunes_plain_ids=version_key(version) >= TUNES_PLAIN_IDS,
        arguments={n: frozenset(inspect.signature(f).parameters) for n, f in functions.items()},
        activation_names=frozenset(flashinfer.ActivationType.__members__),
    )
