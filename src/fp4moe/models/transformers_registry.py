"""`experts_implementation="fp4moe"`: fused experts through transformers' own registry.

One name for each number format: "fp4moe" is NVFP4, "fp4moe_fp8" and the like are the others. The
first eager call of an experts module packs its weights and frees the float ones; the first call
under another implementation puts float weights back, with the format's rounding.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import torch
from torch import nn

from ..errors import refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from ..module import FusedExperts
from . import quantized  # noqa: F401  which saves what is packed here, too
from .block import ACTIVATION_SCALES, as_default_scales, value_reasons
from .experts_module import FUSED_CHILD, describe_experts, float_parameters

__all__ = ["FORMAT_OF", "experts_forward", "register_experts"]

logger = logging.getLogger("fp4moe")
NAME = "fp4moe"
# What each implementation's name says the experts are packed in.
FORMAT_OF = {NAME if f == DEFAULT_FORMAT else f"{NAME}_{f}": f for f in FORMATS}
# An empty buffer beside the packed experts: whoever casts the model casts it, and so says what
# dtype the float weights would have by now.
LIKE_FLOATS = "fp4moe_like_floats"
# Which of the float weights required a gradient.
TRAINED = "fp4moe_trained"

# Threads must see a module either with its float weights or with the packed ones.
_packing = threading.Lock()
# The configuration whose switch to another implementation was announced last.
_announced: Any = None


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    format: str = DEFAULT_FORMAT,
) -> torch.Tensor:
    """What an experts module calls under `experts_implementation="fp4moe"` or `"fp4moe_<format>"`.

    The first call packs the weights, whichever thread makes it, and frees the float ones. After
    `model.set_experts_implementation` of another name, the next call of each module decodes them
    into parameters of the model's dtype again and logs a warning: they keep the format's rounding,
    and so do those that another format of fp4moe packs next. Load the model again for the original
    numbers.

    Raises:
        UnsupportedError: these experts cannot be fused; lists the reasons. Or they are to be
            trained.
    """
    fused = getattr(self, FUSED_CHILD, None)
    if fused is None:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg="fp4moe: experts are packed at their first eager call; got one under "
                "torch.compile. Call fp4moe.replace_moe(model), or the model once, before that."
            )
        # Decorating _pack would import dynamo with the package.
        fused = torch.compiler.disable(_pack)(self, format)
    return fused(hidden_states, top_k_index, top_k_weights)


def _pack(module: Any, format: str) -> FusedExperts:
    global _announced
    with _packing:
        if present := module._modules.get(FUSED_CHILD):
            return present
        candidate = describe_experts("experts", module)
        reasons = candidate.reasons or value_reasons(candidate)
        if reasons or candidate.quantize is None:
            what = f"the experts of {type(module).__name__} cannot be fused"
            reason = "; ".join(reasons)
            refuse("register_transformers", what, reason, "Choose another experts_implementation.")
        floats = dict(module.named_parameters(recurse=False))
        trained = tuple(n for n in candidate.parameters if floats[n].requires_grad)
        if trained and module.training and torch.is_grad_enabled():
            refuse(
                "register_transformers",
                f"the experts of {type(module).__name__} cannot be trained",
                f"packed weights are frozen, and {', '.join(trained)} require gradients",
                "Call requires_grad_(False) on them, as PEFT does, or choose another "
                "experts_implementation.",
            )
        fused = FusedExperts(candidate.quantize("max", format)).train(module.training)
        setattr(module, TRAINED, trained)
        like = floats["down_proj"].detach().new_empty(0)
        module.register_buffer(LIKE_FLOATS, like, persistent=False)
        # The packed experts first: another thread looks for them without the lock.
        module.add_module(FUSED_CHILD, fused)
        for name in candidate.parameters:
            delattr(module, name)
        module.register_forward_pre_hook(_unpack_for_others)
        _announced = None
        return fused


def _unpack_for_others(module: Any, args: tuple) -> None:
    """Put float weights back before another implementation looks for them."""
    fused = module._modules.get(FUSED_CHILD)
    wanted = FORMAT_OF.get(module.config._experts_implementation)
    if fused is None or fused.layer.format == wanted:
        return
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="fp4moe: experts are unpacked at the first eager call under another "
            "experts_implementation; got one under torch.compile. Call the model once before that."
        )
    torch.compiler.disable(_unpack)(module)


def _unpack(module: Any) -> None:
    global _announced
    with _packing:
        fused = module._modules.get(FUSED_CHILD)
        if fused is None:
            return
        like = module.get_buffer(LIKE_FLOATS)
        for name, tensor in float_parameters(module, fused.weights, like.dtype).items():
            trained = name in getattr(module, TRAINED)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
        scales = fused.activation_scales()
        if any(bool((scale != 1).any()) for scale in scales):
            setattr(module, ACTIVATION_SCALES, as_default_scales(scales, fused.layer.format))
        for name in (FUSED_CHILD, LIKE_FLOATS, TRAINED):
            delattr(module, name)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _unpack_for_others]:
            del hooks[key]
        if _announced is not module.config:
            logger.warning(
                "fp4moe: the experts go back to experts_implementation=%r with the values of their "
                "packed weights, which carry the rounding of %s; load the model again for the "
                "original ones",
                module.config._experts_implementation,
                fused.layer.format,
            )
            _announced = module.config


def register_experts() -> None:
    """Register "fp4moe" and "fp4moe_<format>" with transformers' names; safe to repeat."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name, format in FORMAT_OF.items():
        forward = functools.partial(experts_forward, format=format)
        ALL_EXPERTS_FUNCTIONS.register(name, forward)
