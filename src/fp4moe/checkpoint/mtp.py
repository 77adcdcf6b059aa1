"""Which tensors of a checkpoint belong to layers of multi-token prediction (MTP), by their names.

Families store such layers under names of their own (`mtp.layers.0`, `model.mtp_layers.0`,
`model.mtp_block.0`), or inline, numbered on behind the decoder's: model.layers.61 of 61 layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["decoder_layers", "mtp_module", "plain_name"]

NAMED = re.compile(r"(?:.*?\.)?(?:mtp|nextn)(?:_[a-z_]+)?(?=\.|$)")
NUMBERED = re.compile(r"(?:.*?\.)?layers\.([0-9]{1,9})(?=\.|$)")
# What transformers and the hub put before a layer, and other names for a layer's MLP.
PREFIXES = ("model", "language_model", "backbone", "llm")
MLP = ("block_sparse_moe", "ffn")
# Towers whose layers are counted apart.
TOWERS = re.compile("vision|visual|image|audio|speech")


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """Return how many layers the decoder of a config.json has, None where it does not say.

    Of several decoders the largest counts, so that none of their layers is taken for another.
    """
    return max(_counts(config), default=None)


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    count = config.get("num_hidden_layers")
    if type(count) is int and count > 0:
        yield count
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict) and not TOWERS.search(name):
            yield from _counts(value)


def plain_name(module: str) -> str:
    """Return a module's name without what differs between a model and its files."""
    parts = module.split(".")
    while parts[0] in PREFIXES and len(parts) > 1:
        parts.pop(0)
    return ".".join("mlp" if part in MLP else part for part in parts)


def mtp_module(name: str, layers: int | None) -> str | None:
    """Return the part of a name that leads to its MTP layer or module; None where it is in none.

    Args:
        name: a key or a module, such as model.layers.61.mlp.experts.
        layers: of the decoder, see `decoder_layers`; None knows the named ones only.
    """
    if match := NAMED.match(name):
        return match[0]
    match = NUMBERED.match(name)
    if match and layers is not None and int(match[1]) >= layers and not TOWERS.search(match[0]):
        return match[0]
    return None
