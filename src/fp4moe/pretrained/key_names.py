"""The names that transformers gives to the keys of a checkpoint, and which keys it lets go.

Its own renamings are applied, also to keys of packed tensors, which its model does not have.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ..checkpoint.naming import Convention
from ..checkpoint.plan import inside

__all__ = ["KeyNames", "may_skip", "optional_names"]

# How configurations count them: num_nextn_predict_layers, num_mtp_layers, mtp_num_hidden_layers,
# num_mtp_modules.
PREDICTION = re.compile(r"^(?=.*(?:mtp|nextn)).*(?:layers|modules)$")


class KeyNames:
    """Renames keys as transformers does, also for tensors that its model does not have."""

    def __init__(
        self,
        model: Any,
        conversions: list[Any],
        experts: Collection[str],
        convention: Convention,
    ):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        # Copies: transforms remember what they were used for.
        own = copy.deepcopy(conversions)
        self.renamings = [c for c in own if isinstance(c, WeightRenaming)]
        self.converters = [c for c in own if isinstance(c, WeightConverter)]
        self.prefix, self.experts = model.base_model_prefix, experts
        self.state = model.state_dict()
        self.linears = {p for p, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.leaves = set(convention.parts)

    def get(self, name: str) -> object:
        """Be the state_dict that transformers looks prefixes up in."""
        module, _, leaf = name.rpartition(".")
        known = name in self.state or inside(name, self.experts) is not None
        return True if known or (module in self.linears and leaf in self.leaves) else None

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def name(self, key: str) -> str:
        """The name of a key in the model, unmerged."""
        return self._rename(key, [])[0]

    def merged(self, key: str) -> tuple[str, bool]:
        """The name of the tensor that a key becomes, and whether it is a part of it only."""
        name, pattern = self._rename(key, self.converters)
        return name, pattern is not None

    def further(self, key: str) -> list[str]:
        """The other tensors that a key is cut into, such as k and v of a stacked q, k and v."""
        name, pattern = self._rename(key, self.converters)
        for converter in self.converters:
            first, *others = converter.target_patterns
            if others and pattern in converter.source_patterns:
                return [name.replace(first, other) for other in others]
        return []

    def _rename(self, key: str, converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        # It only asks meta_state_dict.get.
        state: Any = self
        rename = functools.partial(
            rename_source_key, base_model_prefix=self.prefix, meta_state_dict=state
        )
        name, pattern = rename(key, self.renamings, converters)
        if name not in self and key in self:
            return rename(key, [], [])
        return name, pattern


def optional_names(model: Any) -> set[str]:
    """Names that transformers makes itself: tied ones, and those that the class lets go."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    patterns = list(model._keys_to_ignore_on_load_missing or ())
    return set(ties) | {
        name for name in model.state_dict() if any(re.search(p, name) for p in patterns)
    }


def may_skip(model: Any) -> Callable[[str], bool]:
    """Return whether a key may have no place in the model.

    Its class says so, or the key is of multi-token prediction, which is named so or lies in the
    layers that the configuration counts behind those of the model.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    patterns += [r"(^|\.)(mtp|nextn)(_[a-z_]+)?\.", *_prediction_layers(model)]
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    return lambda key: ignored.search(key) is not None


def _prediction_layers(model: Any) -> list[str]:
    """Patterns of the layers of multi-token prediction behind the last one."""
    text = model.config.get_text_config()
    last = getattr(text, "num_hidden_layers", None)
    counts = [
        value
        for config in (model.config, text)
        for name, value in config.to_dict().items()
        if PREDICTION.search(name) and type(value) is int
    ]
    if not isinstance(last, int) or max(counts, default=0) < 1:
        return []
    numbers = "|".join(map(str, range(last, last + max(counts))))
    # The stack itself: those of a vision tower have a last layer of their own.
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == last and path.endswith("layers")
    ]
    return [rf"^{re.escape(path)}\.({numbers})\." for path in stacks]
