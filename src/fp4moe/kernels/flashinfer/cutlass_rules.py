"""What FlashInfer's CUTLASS NVFP4 mixture-of-experts kernel can run: data and rules, no import.

Read from the sources of FlashInfer 0.6.13 and 0.7.2; no GPU was asked. Enum members are named, not
numbered: `Identity` is 8 in the one and 9 in the other.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES", "GATED", "UNGATED", "enum_name", "reasons", "size_multiples"]

# First where nothing else of FlashInfer runs, then where TRT-LLM-Gen comes first.
CAPABILITIES = ((12, 0), (12, 1), (10, 0), (10, 3))

# Our activation -> member of ActivationType; `Geglu` and `Gelu` are erf, `GegluTanh` is tanh.
GATED = {"silu": "Swiglu", "gelu_tanh": "GegluTanh", "gelu": "Geglu"}
UNGATED = {
    "relu2": "Relu2",
    "relu": "Relu",
    "silu": "Silu",
    "gelu": "Gelu",
    "identity": "Identity",
}


def enum_name(activation: str, gated: bool) -> str | None:
    """Return the member of FlashInfer's ActivationType that computes this; None without one."""
    return (GATED if gated else UNGATED).get(activation)


def size_multiples(gated: bool) -> tuple[int, int]:
    """Return the multiples that hidden and intermediate size are padded to.

    At these, block scales in the kernel's order need no padding of their own: their atom has 128
    rows and 64 columns. The kernel alone would take hidden sizes by 32, padded scales beside.
    """
    # Without a gate, the library checks block scale rows against multiples of 64, but steps from
    # expert to expert by multiples of 128: at 704 or 1856 rows it reads the wrong scales.
    return (128, 64) if gated else (128, 128)


def reasons(activation: str, gated: bool, enum_names: frozenset[str] | None) -> list[str]:
    """Return why the kernel cannot run such a layer, on any device; empty where it can.

    Sizes do not matter: any can be padded to `size_multiples`.

    Args:
        activation: a name of `fp4moe.activations.ACTIVATIONS`.
        gated: whether the layer has gate weights.
        enum_names: members of the installed ActivationType; None takes every name as known.
    """
    found = []
    name = enum_name(activation, gated)
    if name is None:
        known = ", ".join(GATED if gated else UNGATED)
        found.append(
            f"activation must be one of {known} {'with' if gated else 'without'} a gate, got "
            f"{activation}"
        )
    elif enum_names is not None and name not in enum_names:
        found.append(
            f"the installed FlashInfer has no ActivationType.{name}, which {activation} "
            f"{'with' if gated else 'without'} a gate needs: install a newer flashinfer-python"
        )
    return found
