"""Checkpoints for several processes to load."""

from __future__ import annotations

from unittest import mock

import pytest
import tiny_models
import torch

import fp4moe

# Two processes hold exactly half of 64; of 48 one holds two blocks, the other one.
SIZES = {"moe_intermediate_size": 64, "intermediate_size": 128}


def build(name, **sizes):
    with mock.patch.dict(tiny_models.COMMON, SIZES | sizes):
        make = getattr(tiny_models, name, None)
        made = make("eager") if make else tiny_models.family(name, "eager")
    model = tiny_models.enlarge_experts(made).to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function: (name of a tiny model, format or None for floats, sizes) -> directory."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save(name, form="nvfp4", **sizes):
        stem = "_".join([name, *map(str, sizes.values())])
        if not (root / stem).exists():
            build(name, **sizes).save_pretrained(root / stem)
        if form is None:
            return root / stem
        packed = root / f"{stem}_{form}"
        if not packed.exists():
            fp4moe.quantize_checkpoint(root / stem, packed, format=form, progress=False)
        return packed

    return save
