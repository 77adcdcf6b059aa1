"""The kernels in order of preference, and the choice among them, with reasons.

The interface of a kernel is `base.Kernel`. The choice is made from sizes and device before
anything runs; a kernel that fails is never replaced by another.
"""

from __future__ import annotations

import dataclasses

from ..activations import Activation, get_activation
from ..errors import UnsupportedError, check_choice, must, refuse
from ..formats import FORMATS
from ..layer import ROUTINGS, Layer
from .base import Kernel, current_capability
from .flashinfer.cutlass import FLASHINFER_CUTLASS
from .flashinfer.trtllm import FLASHINFER_TRTLLM, FLASHINFER_TRTLLM_W4A16
from .hopper.kernel import HOPPER
from .humming.kernel import HUMMING
from .humming.library import toolkit_variables
from .measured import fastest, times_forgotten
from .reference import REFERENCE, REFERENCE_W4A4
from .triton.kernel import TRITON
from .triton.w8a8 import TRITON_W8A8

__all__ = [
    "KERNELS",
    "check_kernel_name",
    "choice_state",
    "choose_kernel",
    "get_kernel",
    "select_kernel",
    "why_not",
]

_PRESENT: tuple[Kernel, ...] = (
    FLASHINFER_TRTLLM,
    FLASHINFER_CUTLASS,
    TRITON_W8A8,
    HOPPER,
    TRITON,
    HUMMING,
    REFERENCE,
    REFERENCE_W4A4,
    # By name only.
    FLASHINFER_TRTLLM_W4A16,
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _PRESENT}
# Names that users may look for, and why there is no such kernel.
IMPOSSIBLE = {
    "humming_w4a8": "humming-kernels 0.1.19 multiplies FP8 activations with weights in blocks of "
    "32 or more values, NVFP4 has blocks of 16; take humming or triton, with 16-bit activations",
}


def check_kernel_name(kernel: str, *, caller: str) -> None:
    """Raise UnsupportedError unless `kernel` is "auto" or a kernel's name."""
    if kernel not in ("auto", *KERNELS, *IMPOSSIBLE):
        rule = f"be auto or one of {', '.join(KERNELS)}"
        got = repr(kernel)
        must(f"{caller}: kernel", rule, got, "Pass one of these names.", error=UnsupportedError)


def get_kernel(name: str, *, caller: str = "FusedExperts") -> Kernel:
    """Return the kernel of that name."""
    if name not in KERNELS:
        check_kernel_name(name, caller=caller)
        rule = "be the name of one kernel"
        advice = f"Pass one of {', '.join(KERNELS)}."
        must(f"{caller}: kernel", rule, repr(name), advice, error=UnsupportedError)
    return KERNELS[name]


def why_not(
    kernel: str,
    *,
    activation: str | Activation,
    gated: bool,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    capability: tuple[int, int] | None = None,
    padded: bool = True,
    format: str = "nvfp4",
    biased: bool = False,
    quantized_activations: bool = False,
    routing: str = "given",
) -> list[str]:
    """Return the reasons why a kernel cannot run such a layer; empty where it can.

    Args:
        kernel: "auto" (can any run it?) or a kernel's name.
        activation: an `fp4moe.Activation`, or its name or text.
        gated: whether the layer has gate weights.
        hidden_size: H of the layer.
        intermediate_size: I of one expert.
        num_experts: experts of the layer.
        top_k: experts that a token chooses.
        capability: CUDA compute capability; default that of the current device, None on a CPU.
        padded: whether zero padding of the weights is allowed; False asks for exactly this size.
        format: the number format of the weights.
        biased: whether the experts have biases.
        quantized_activations: whether the checkpoint says that activations are rounded, too, so
            that "auto" may take triton_w8a8.
        routing: "given", or "fused" where the kernel is to choose the experts, see `replace_moe`.

    Raises:
        UnsupportedError: no such kernel or activation. ShapeError: a size below 1, or top_k above
            num_experts.
    """
    check_kernel_name(kernel, caller="why_not")
    activation = get_activation(activation, caller="why_not")
    activation.check_gate(gated, caller="why_not")
    check_choice("format", format, FORMATS, caller="why_not")
    check_choice("routing", routing, ROUTINGS, caller="why_not")
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    for name, value in sizes.items():
        if value < 1:
            must(f"why_not: {name}", "be at least 1", value, "Pass the size of the layer.")
    if top_k > num_experts:
        rule = f"not exceed num_experts = {num_experts}"
        must("why_not: top_k", rule, top_k, "Pass experts per token.")
    capability = current_capability() if capability is None else capability
    layer = Layer(
        str(activation),
        gated,
        **sizes,
        format=format,
        biased=biased,
        quantized_activations=quantized_activations,
        kernel_routes=routing == "fused",
    )
    if kernel != "auto":
        return _reasons(kernel, layer, capability, padded)
    reasons = _candidates(kernel, layer, capability, padded)
    if not all(reasons.values()):
        return []
    return [f"{name}: {why}" for name, whys in reasons.items() for why in whys]


def choose_kernel(
    kernel: str, layer: Layer, capability: tuple[int, int] | None
) -> tuple[str | None, list[str]]:
    """Return (the kernel for this, []), or (None, each candidate with its reasons).

    Among several, the first, or the fastest where they were measured (see `measured`).
    """
    reasons = _candidates(kernel, layer, capability, True)
    if able := [name for name, whys in reasons.items() if not whys]:
        return fastest(able, layer, capability), []
    return None, [f"{name}: {'; '.join(whys)}" for name, whys in reasons.items()]


def select_kernel(
    kernel: str, layer: Layer, capability: tuple[int, int] | None, *, caller: str
) -> str:
    """Return the name of the kernel to use.

    Raises:
        UnsupportedError: it cannot run this; lists each candidate with its reasons.
    """
    check_kernel_name(kernel, caller=caller)
    name, refused = choose_kernel(kernel, layer, capability)
    if name is None:
        able = "no kernel can" if kernel == "auto" else f"kernel {kernel!r} cannot"
        what = f"{able} run this layer ({layer.on(capability)})"
        refuse(caller, what, ". ".join(refused), "See fp4moe.why_not.")
    return name


def choice_state() -> tuple:
    """Return what choices hang on beside layer and device: they stand as long as this is equal.

    Packages that are installed later are seen by choices that were not made before.
    """
    return times_forgotten(), *toolkit_variables()


def _candidates(
    kernel: str, layer: Layer, capability: tuple[int, int] | None, padded: bool
) -> dict[str, list[str]]:
    """Return the kernels to choose from, each with the reasons against it."""
    if kernel != "auto":
        return {kernel: _reasons(kernel, layer, capability, padded)}
    # One that cannot but route would refuse each call outside a compiled graph: by name only.
    layer = dataclasses.replace(layer, kernel_routes=False)
    names = [name for name, found in KERNELS.items() if found.automatic_for(layer)]
    return {name: _reasons(name, layer, capability, padded) for name in names}


def _reasons(
    name: str, layer: Layer, capability: tuple[int, int] | None, padded: bool
) -> list[str]:
    if name in IMPOSSIBLE:
        return [IMPOSSIBLE[name]]
    kernel = KERNELS[name]
    reasons = kernel.reasons_not_to_run(layer, capability)
    return reasons if padded else reasons + kernel.reasons_without_padding(layer)
