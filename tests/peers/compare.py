"""Compare what two sides hand to one FlashInfer function, argument by argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from flashinfer_contract import installed_features

__all__ = ["Neutral", "differences", "neutral", "one_call", "same", "same_quantisation"]


@dataclasses.dataclass(frozen=True)
class Neutral:
    """A difference that changes no number.

    Attributes:
        reason: why not.
        holds: of (ours, theirs), whether they differ in this way and no other.
    """

    reason: str
    holds: Callable[[Any, Any], bool]


def _narrower(ours: Any, theirs: Any) -> bool:
    """None lets the library allocate the padded width."""
    if theirs is None:
        return ours.dtype == torch.bfloat16
    return ours.dtype == theirs.dtype and len(ours) == len(theirs) and ours.size(1) < theirs.size(1)


def _either(*values: Any) -> Callable[[Any, Any], bool]:
    return lambda ours, theirs: ours in values and theirs in values


NO_GROUPS = Neutral("the launcher takes None for 0, and one group is none", _either(None, 0, 1))
_ALWAYS = {
    "n_group": NO_GROUPS,
    "topk_group": NO_GROUPS,
    "routed_scaling_factor": Neutral("the launcher takes None for 1", _either(None, 1.0)),
    "output": Neutral("a narrow output makes the kernel drop the padding", _narrower),
    "enable_pdl": Neutral("only speed; None lets the library choose", _either(None, True)),
    "tune_max_num_tokens": Neutral(
        "only speed: how far the tuner distinguishes token counts",
        lambda ours, theirs: min(ours, theirs) > 0,
    ),
    "hidden_states_scale_layout": Neutral(
        "only checked: None stands for linear, with a warning",
        lambda ours, theirs: ours.name == "layout_linear" and theirs is None,
    ),
}


def neutral(theirs: dict[str, Any]) -> dict[str, Neutral]:
    """Return the neutral differences in a call of TRT-LLM-Gen's two functions; theirs is the call.

    Its experts say which ids are of other ranks.
    """
    first, count = theirs["local_expert_offset"], theirs["local_num_experts"]
    newer = installed_features().float32_routing_weights
    dtype = torch.float32 if newer else torch.bfloat16

    def ids_and_weights(ours: Any, theirs: Any) -> bool:
        (ids, weights), (all_ids, all_weights) = ours, theirs
        inside = (all_ids >= first) & (all_ids < first + count)
        return same(ids, all_ids.where(inside, -1)) and same(weights, all_weights.to(dtype))

    routing = Neutral(
        "the kernel drops ids of other ranks, -1 too; before 0.6.18 it reads any weights as "
        "bfloat16, which only ours give it",
        ids_and_weights,
    )
    return {**_ALWAYS, "topk_ids": routing}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal: tensors in shape, dtype, memory order and every bit."""
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return False
        if not (ours.is_contiguous() and theirs.is_contiguous()):
            return False
        return torch.equal(_bytes(ours), _bytes(theirs))
    if isinstance(ours, torch.Tensor) or isinstance(theirs, torch.Tensor):
        return False
    # An enum of one side is the number of the other; True is no number.
    return ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)


def differences(
    ours: dict[str, Any], theirs: dict[str, Any], allowed: dict[str, Neutral]
) -> list[str]:
    """Return the names of the arguments that differ otherwise than a neutral difference says."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    found = []
    for name, mine in ours.items():
        if same(mine, theirs[name]):
            continue
        if name not in allowed or not allowed[name].holds(mine, theirs[name]):
            found.append(name)
    return found


def one_call(calls: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    """Return the arguments of the one call of that name."""
    (found,) = [arguments for called, arguments in calls if called == name]
    return found


def same_quantisation(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether both quantise the same padded input with the same encode scale.

    vLLM repeats the scale for each expert.
    """
    scale = ours["scale"].reshape(())
    return same(ours["hidden"], theirs["hidden"]) and bool((theirs["scale"] == scale).all())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # A single element may carry any stride.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
