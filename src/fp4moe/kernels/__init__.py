"""The kernels in order of preference, and the choice among them, with reasons.

A kernel has `name`, `automatic`, `reasons_not_to_run(spec)`, `size_multiples(spec)`,
`prepare(weights)`, `restore(prepared)` and `run(...)`. The choice is made from sizes and device
before anything runs; a kernel that fails is never replaced by another.
"""

from __future__ import annotations

import torch

from ..activations import get_activation
from ..errors import ShapeError, UnsupportedError
from .reference import REFERENCE, REFERENCE_W4A4, ReferenceKernel
from .spec import HIDDEN_ALIGNMENTS, ROUTINGS, MoeSpec

__all__ = [
    "HIDDEN_ALIGNMENTS",
    "KERNELS",
    "KERNEL_NAMES",
    "ROUTINGS",
    "MoeSpec",
    "check_kernel_name",
    "choose_kernel",
    "get_kernel",
    "select_kernel",
    "why_not",
]

KERNELS: dict[str, ReferenceKernel] = {k.name: k for k in (REFERENCE, REFERENCE_W4A4)}
# Names of the contract whose kernels later versions bring.
PLANNED = {
    "flashinfer_trtllm": "compute capability 10.0 or 10.3",
    "flashinfer_cutlass": "compute capability 12.0 or 12.1",
    "triton": "compute capability 8.0 or newer",
    "humming": "compute capability 7.5 or newer",
}
KERNEL_NAMES = (*PLANNED, *KERNELS)


def current_capability(device: torch.device | None = None) -> tuple[int, int] | None:
    """Return the CUDA compute capability of the device (default: the current); None on a CPU."""
    if device is not None and device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def check_kernel_name(kernel: str, *, caller: str) -> None:
    """Raise UnsupportedError unless `kernel` is "auto" or a kernel's name."""
    if kernel != "auto" and kernel not in KERNEL_NAMES:
        raise UnsupportedError(
            f"{caller}: kernel must be auto or one of {', '.join(KERNEL_NAMES)}; got {kernel!r}. "
            "Pass one of these names."
        )


def get_kernel(name: str) -> ReferenceKernel:
    """Return the kernel of that name, which must be present in this version."""
    if name not in KERNELS:
        check_kernel_name(name, caller="get_kernel")
        advice = _absent(name) if name in PLANNED else "Choose one with select_kernel."
        raise UnsupportedError(
            f"get_kernel: kernel must be one that this version has; got {name!r}. {advice}"
        )
    return KERNELS[name]


def why_not(
    kernel: str,
    *,
    activation: str,
    gated: bool,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    capability: tuple[int, int] | None = None,
    padded: bool = True,
) -> list[str]:
    """Return the reasons why a kernel cannot run such a layer; empty where it can.

    Args:
        kernel: "auto" (can any run it?) or a kernel's name.
        activation: a name of `fp4moe.activations.ACTIVATIONS`.
        gated: whether the layer has gate weights.
        hidden_size, intermediate_size, num_experts, top_k: of the layer.
        capability: CUDA compute capability; default that of the current device, None on a CPU.
        padded: whether zero padding of the weights is allowed; False asks for exactly this size.

    Raises:
        UnsupportedError: no such kernel or activation. ShapeError: a size below 1, or top_k above
            num_experts.
    """
    check_kernel_name(kernel, caller="why_not")
    get_activation(activation, caller="why_not")
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ShapeError(
                f"why_not: {name} must be at least 1; got {value}. Pass the size of the layer."
            )
    if top_k > num_experts:
        raise ShapeError(
            f"why_not: top_k must not exceed num_experts = {num_experts}; got {top_k}. Pass "
            "experts per token."
        )
    capability = current_capability() if capability is None else capability
    spec = MoeSpec(
        activation, gated, hidden_size, intermediate_size, num_experts, top_k, capability
    )
    if kernel != "auto":
        return _reasons(kernel, spec, padded)
    reasons = {name: _reasons(name, spec, padded) for name in _candidates(kernel)}
    if not all(reasons.values()):
        return []
    return [f"{name}: {why}" for name, whys in reasons.items() for why in whys]


def choose_kernel(kernel: str, spec: MoeSpec) -> tuple[str | None, list[str]]:
    """Return (the first kernel that runs this, []), or (None, each candidate with its reasons)."""
    refused = []
    for name in _candidates(kernel):
        reasons = _reasons(name, spec, padded=True)
        if not reasons:
            return name, []
        refused.append(f"{name}: {'; '.join(reasons)}")
    return None, refused


def select_kernel(kernel: str, spec: MoeSpec, *, caller: str) -> str:
    """Return the name of the kernel to use.

    Raises:
        UnsupportedError: it cannot run this; lists each candidate with its reasons.
    """
    check_kernel_name(kernel, caller=caller)
    name, refused = choose_kernel(kernel, spec)
    if name is None:
        raise UnsupportedError(
            f"{caller}: kernel must be one that runs this layer ({spec}); got {kernel!r}. "
            f"{'. '.join(refused)}."
        )
    return name


def _candidates(kernel: str) -> list[str]:
    if kernel != "auto":
        return [kernel]
    return [name for name in KERNEL_NAMES if name not in KERNELS or KERNELS[name].automatic]


def _reasons(name: str, spec: MoeSpec, padded: bool) -> list[str]:
    if name not in KERNELS:
        return [_absent(name)]
    kernel = KERNELS[name]
    reasons = kernel.reasons_not_to_run(spec)
    if not padded:
        for what, multiple in zip(
            ("hidden_size", "intermediate_size"), kernel.size_multiples(spec), strict=True
        ):
            if getattr(spec, what) % multiple:
                reasons.append(
                    f"{what} must be a multiple of {multiple} without padding, got "
                    f"{getattr(spec, what)}"
                )
    return reasons


def _absent(name: str) -> str:
    return f"not in this version of fp4moe (it will need {PLANNED[name]})"
