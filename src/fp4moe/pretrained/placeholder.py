"""What a run of from_pretrained is asked for, and placeholders.

These stand in the places of packed modules until they are read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..checkpoint.files import CheckpointFiles
from ..formats import DEFAULT_FORMAT
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT

__all__ = ["Options", "Placeholder"]


@dataclasses.dataclass
class Options:
    """Keywords of fp4moe.from_pretrained that transformers does not know.

    files is the checkpoint if it is open already: its headers are read once. format is that of
    float experts.
    """

    kernel: str = "auto"
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT
    routing: str = "given"
    progress: bool = True
    files: CheckpointFiles | None = None
    format: str = DEFAULT_FORMAT

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """Return this one: transformers copies configurations."""
        return self


class Placeholder(nn.Module):
    """Stands for packed tensors while transformers plans and loads the rest.

    Its parameters, on the meta device, count for `device_map="auto"` and are in no state_dict;
    `place` is empty and tells where transformers puts what stands here.
    """

    place: torch.Tensor

    def __init__(self, nbytes: int, **facts: int):
        super().__init__()
        if nbytes:
            size = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            self.packed = nn.Parameter(size, requires_grad=False)
        # What transformers asks of modules that it splits: num_experts, out_features, in_features.
        vars(self).update(facts)
        self.register_buffer(
            "place", torch.empty(0, dtype=torch.float32, device="meta"), persistent=False
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Save nothing: transformers must neither load nor initialise it."""
