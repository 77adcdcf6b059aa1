"""`experts_implementation="fp4moe"`: fused experts through transformers' own registry.

The first eager call of an experts module packs its weights and frees the float ones. The
registration waits until transformers is imported, so that importing fp4moe does not import it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from ..candidates import value_reasons
from ..errors import UnsupportedError
from ..module import FusedExperts
from .transformers import FUSED_CHILD, describe_experts

__all__ = ["experts_forward", "register_transformers", "register_when_imported"]

REGISTRY = "transformers.integrations.moe"


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What an experts module calls under `experts_implementation="fp4moe"`.

    Raises:
        UnsupportedError: these experts cannot be fused; lists the reasons.
    """
    fused = getattr(self, FUSED_CHILD, None)
    if fused is None:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="fp4moe: experts are packed at their first eager call; got one under "
                "torch.compile. Call fp4moe.replace_moe(model), or the model once, before that."
            )
        # Decorating _pack would import dynamo with the package.
        fused = torch.compiler.disable(_pack)(self)
    return fused(hidden_states, top_k_index, top_k_weights)


def _pack(module: Any) -> FusedExperts:
    candidate = describe_experts("experts", module)
    reasons = candidate.reasons or value_reasons(candidate)
    if reasons or candidate.quantize is None:
        raise UnsupportedError(
            f"fp4moe: experts must be ones that can be fused; got {type(module).__name__}: "
            f"{'; '.join(reasons)}. Choose another experts_implementation."
        )
    fused = FusedExperts(candidate.quantize("max"))
    for name in candidate.parameters:
        delattr(module, name)
    module.add_module(FUSED_CHILD, fused)
    return fused


def register_transformers() -> None:
    """Register the name "fp4moe" with transformers' experts implementations; safe to repeat.

    Happens by itself when fp4moe and transformers are both imported.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("fp4moe", experts_forward)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls register_transformers once transformers' registry has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: types.ModuleType) -> None:
                execute(module)
                module.ALL_EXPERTS_FUNCTIONS.register("fp4moe", experts_forward)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        register_transformers()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
