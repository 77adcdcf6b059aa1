"""What a run of from_pretrained is asked for, what a checkpoint says of itself, and placeholders.

These stand in the places of packed modules until they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.compressed_tensors import compressed_convention, is_compressed_tensors
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.huggingface import huggingface_convention, is_huggingface
from ..checkpoint.modelopt import is_modelopt, modelopt_convention
from ..checkpoint.naming import FLOAT, FORMS, OTHER, Convention, fail
from ..formats import DEFAULT_FORMAT
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT

__all__ = ["Options", "Placeholder", "convention_of"]

# What other methods of transformers store, for the refusal.
METHODS = {"fbgemm_fp8": "fp8_channel"}


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


def convention_of(quantization: Mapping[str, Any] | None) -> Convention:
    """Read a quantization configuration; None is a float checkpoint.

    Raises:
        CheckpointError: the tool, or what it announces, is unknown.
    """
    if quantization is None:
        return FLOAT
    if is_modelopt(quantization):
        return modelopt_convention(quantization)
    if is_compressed_tensors(quantization):
        return compressed_convention(quantization)
    if is_huggingface(quantization):
        return huggingface_convention(quantization)
    method = quantization.get("quant_method")
    form = METHODS.get(method) if isinstance(method, str) else None
    got = f"quant_method {method!r}"
    if form is not None:
        rule = "hold a quantisation that is read here"
        fail(rule, f"{got}, which is {FORMS[form]} and not read yet", OTHER)
    known = (
        "Known are ModelOpt's and compressed-tensors' files, quant_method fp8, mxfp8 and mxfp4, "
        "and float checkpoints"
    )
    fail("be quantised by a known tool", got, known)


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
