"""Float models that hold the dequantised weights of packed ones, and their biases as they are."""

from __future__ import annotations

import copy

import torch

from fp4moe.module import FusedExperts


def fused_parts(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, FusedExperts)}


def stored(module, parts):
    """Return the parameters that `module` would hold these float weights in, by its stamps."""
    interleaved = not getattr(module, "is_concatenated", True)

    def rows(gate, up):
        return torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)

    gated = "gate" in parts
    first = rows(parts["gate"], parts["up"]) if gated else parts["up"]
    name = "gate_up_proj" if gated else "up_proj"
    both = {name: first, "down_proj": parts["down"]}
    if getattr(module, "is_transposed", False):
        both = {n: w.transpose(1, 2) for n, w in both.items()}
    if "down_bias" in parts:
        bias = rows(parts["gate_bias"], parts["up_bias"]) if gated else parts["up_bias"]
        both |= {f"{name}_bias": bias, "down_proj_bias": parts["down_bias"]}
    return both


def float_twin(original, replaced):
    """Copy `original` with the dequantised weights of `replaced`, on Hugging Face's eager loop."""
    twin = copy.deepcopy(original)
    for path, fused in fused_parts(replaced).items():
        module = twin.get_submodule(path)
        for name, weight in stored(module, fused.weights.dequantize()).items():
            getattr(module, name).data.copy_(weight)
    if any(hasattr(m, "is_transposed") for m in twin.modules()):
        twin.set_experts_implementation("eager")
    return twin
