"""What an experts module of transformers computes, found without its weights.

A copy of the module with two experts of random float32 weights is described and compared with the
definition (models/experts_module.py), so a module on the meta device is judged by its numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..checkpoint.plan_checks import ExpertsFacts
from ..models.block import value_reasons
from ..models.experts_module import describe_experts
from ..random_floats import random_normal

__all__ = ["describe_on_meta"]

PROBED = 2


def describe_on_meta(
    path: str, module: Any, config: Any = None
) -> tuple[ExpertsFacts | None, list[str]]:
    """Return (facts, reasons why it cannot be packed); facts are None where there are reasons."""
    generator = torch.Generator("cpu").manual_seed(0)
    probe = object.__new__(type(module))
    vars(probe).update(vars(module))
    probe._parameters, count = {}, None
    for name, parameter in module._parameters.items():
        if parameter is None:
            probe._parameters[name] = None
            continue
        count = parameter.shape[0]
        shape = (min(PROBED, count), *parameter.shape[1:])
        fan_in = shape[-1] if len(shape) == 3 else 1
        # Made on the CPU, whatever the default device: models are built under "meta".
        values = random_normal(generator, shape) * fan_in**-0.5
        probe._parameters[name] = nn.Parameter(values, requires_grad=False)
    candidate = describe_experts(path, probe, config)
    reasons = candidate.reasons or value_reasons(candidate)
    if reasons or count is None or candidate.activation is None:
        return None, reasons or ["it has no parameters"]
    assert candidate.hidden_size and candidate.intermediate_size and candidate.storage
    return (
        ExpertsFacts(
            num_experts=count,
            hidden_size=candidate.hidden_size,
            intermediate_size=candidate.intermediate_size,
            activation=candidate.activation,
            gated=bool(candidate.gated),
            layout=candidate.storage.layout,
            transposed=candidate.storage.transposed,
            top_k=candidate.top_k,
            biases=tuple(weight for weight, _ in candidate.storage.biases),
        ),
        [],
    )
