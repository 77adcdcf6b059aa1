"""Dense Linears of a model, quantised in place beside its experts: `linears` of replace_moe."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..checkpoint.float_linears import KEPT, NONE, scale_group
from ..errors import refuse
from ..formats import FORMATS
from ..kernels.linear import LINEAR_KERNELS
from ..linear import PackedLinear, packed_linear

__all__ = ["choose_linears", "pack_linear", "shared_extremes"]


def choose_linears(
    model: nn.Module, linears: str | Sequence[str], format: str, inside: Collection[nn.Module]
) -> dict[str, nn.Linear]:
    """Return the Linears that names or patterns stand for, by path, in module order.

    Args:
        inside: modules that hold experts, whose lists of Linears are none of these.

    Raises:
        UnsupportedError: a name or pattern stands for no Linear, or one cannot be quantised.
    """
    patterns = [linears] if isinstance(linears, str) else list(linears)
    if patterns == [NONE]:
        return {}
    taken = {m for block in inside for child in block.modules() if isinstance(child, nn.ModuleList)
             for m in child.modules()}  # fmt: skip
    found = {
        path: module
        for path, module in model.named_modules()
        if (type(module) is nn.Linear and module not in taken) or isinstance(module, PackedLinear)
    }
    chosen = set()
    for pattern in patterns:
        matches = {path for path in found if fnmatch.fnmatchcase(path, pattern)}
        matches = {p for p in matches if p == pattern or KEPT.isdisjoint(p.split("."))}
        if not matches:
            refuse(
                "replace_moe",
                f"linears = {pattern!r} cannot be quantised",
                f"no torch.nn.Linear of {type(model).__name__} beside its experts has such a name",
                "Pass names or patterns of model.named_modules(), as '*.self_attn.*'.",
            )
        chosen |= matches
    result = {p: m for p, m in found.items() if p in chosen and isinstance(m, nn.Linear)}
    refused = {path: why for path, why in _reasons(model, result, format).items() if why}
    if refused:
        listed = ". ".join(f"{path}: {'; '.join(why)}" for path, why in refused.items())
        what = f"{len(refused)} of {len(result)} Linears cannot be quantised"
        refuse("replace_moe", what, listed, "Leave them out of linears.")
    return result


def _reasons(model: nn.Module, linears: dict[str, nn.Linear], format: str) -> dict[str, list[str]]:
    named = dict(model.named_parameters(remove_duplicate=False))
    shared = Counter(map(id, named.values()))
    multiple, reasons = FORMATS[format].multiple, {}
    for path, linear in linears.items():
        weight, why = linear.weight, []
        if shared[id(weight)] > 1:
            others = [n for n, p in named.items() if p is weight and n != f"{path}.weight"]
            why.append(f"its weight is {', '.join(others)}, too; untie them first")
        if weight.is_meta:
            why.append("its weight is on the meta device; load it first")
        elif not bool(torch.isfinite(weight.detach()).all()):
            why.append("its weight has inf or NaN")
        if linear.in_features % multiple:
            why.append(f"in_features must be a multiple of {multiple}, got {linear.in_features}")
        reasons[path] = why
    return reasons


def shared_extremes(linears: Mapping[str, nn.Linear], format: str) -> dict[str, torch.Tensor]:
    """Return the smallest and largest weights of all that share a path's global scale."""
    groups: dict[str, list[torch.Tensor]] = {}
    for path, linear in linears.items():
        ends = torch.stack(torch.aminmax(linear.weight.detach())).float()
        groups.setdefault(scale_group(path, format), []).append(ends)
    return {
        path: torch.cat(
            [ends.to(linear.weight.device) for ends in groups[scale_group(path, format)]]
        )
        for path, linear in linears.items()
    }


def pack_linear(
    linear: nn.Linear, format: str, method: str, kernel: str, extremes: torch.Tensor
) -> PackedLinear:
    """Return a Linear whose weight is quantised, with the same bias.

    extremes: of `shared_extremes`.
    """
    known, weight = FORMATS[format], linear.weight.detach()
    stored = known.quantize(weight, known.shared_scale(extremes), method)
    global_scale = stored.global_scale.reshape(()) if known.globally_scaled else None
    bias = None if linear.bias is None else linear.bias.detach()
    packed = packed_linear(
        format, stored.packed, stored.block_scale, global_scale, bias,
        kernel=kernel if kernel in LINEAR_KERNELS else "auto",
    )  # fmt: skip
    return packed.train(linear.training)
