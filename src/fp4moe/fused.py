"""`fp4moe.fused_moe`: chooses a kernel and prepares weights once, as long as nothing changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .arguments import has_own_operator
from .errors import must
from .experts import ExpertWeights
from .identity.table import Mark, capturing
from .identity.value_watch import ValueWatch
from .kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    check_kernel_name,
    choice_state,
    current_capability,
    get_kernel,
    select_kernel,
)
from .ops import nvfp4_moe_arguments

__all__ = ["fused_moe", "tensor_versions"]


def fused_moe(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    kernel: str = "auto",
) -> torch.Tensor:
    """Apply the selected experts to each token and sum them by routing weight.

    out[t] = sum_k routing_weights[t, k] * expert(expert_ids[t, k], hidden[t])

    The first call chooses a kernel and prepares its layout. Later calls use both again, as long as
    `weights` lives. They are made anew if top_k, the device, a tensor of `weights`, CUDA_HOME or
    the measurements change. Under torch.compile use `FusedExperts`: it prepares outside the graph.

    Args:
        hidden: [T, H], bfloat16, float16 or float32, any strides; T may be 0.
        weights: the quantised experts of the layer, on the device of hidden.
        expert_ids: [T, K], int32 or int64 global ids. An id that is not local, such as -1,
            contributes nothing.
        routing_weights: [T, K] float, used as given.
        kernel: "auto" or a kernel's name, see `fp4moe.why_not`.

    Returns:
        [T, H] in the dtype of hidden, a fresh tensor; summed in float32 and cast once.

    Raises:
        ShapeError: a shape, dtype or device does not fit. UnsupportedError: no kernel runs this;
            lists the reasons.
    """
    if not isinstance(weights, ExpertWeights):
        rule = "be ExpertWeights"
        must("fused_moe: weights", rule, type(weights).__name__, "Use ExpertWeights.quantize.")
    if hidden.ndim == 2 and hidden.shape[1] != weights.hidden_size:
        rule = f"have shape [T, hidden_size] = [T, {weights.hidden_size}]"
        advice = "Pass the hidden states that these experts were made for."
        must("fused_moe: hidden", rule, list(hidden.shape), advice)
    top_k = expert_ids.shape[-1] if expert_ids.ndim else None
    name = _choose_once(weights, kernel, top_k, current_capability(hidden.device))
    operator, arguments = _prepare_once(weights, name)
    return operator(hidden, expert_ids, routing_weights, *arguments)


# Both die with the weights: by what a choice depends on, and by kernel.
_chosen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_prepared: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# What a mode hands out instead, such as a fake tensor, must not serve a later call.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def _choose_once(
    weights: ExpertWeights, kernel: str, top_k: int | None, capability: tuple[int, int] | None
) -> str:
    """Return the kernel's name, that of an earlier call where all that it depends on is equal."""
    # A symbolic top_k cannot be a key.
    if torch.compiler.is_compiling() or not isinstance(top_k, int):
        return select_kernel(kernel, weights.layer(top_k), capability, caller="fused_moe")
    check_kernel_name(kernel, caller="fused_moe")
    names = _chosen.setdefault(weights, {})
    key = kernel, top_k, capability, choice_state()
    if key not in names:
        layer = weights.layer(top_k)
        names[key] = select_kernel(kernel, layer, capability, caller="fused_moe")
    return names[key]


class _Prepared(NamedTuple):
    """The operator and its arguments for one kernel, and the weights' tensors as they were then.

    Where the arguments are copies in another layout, `pairs` are the tensors with their marks, and
    `watch` looks at their values.
    """

    tensors: tuple[torch.Tensor, ...]
    versions: list[tuple[int, int]]
    call: tuple[Callable[..., torch.Tensor], tuple]
    pairs: list[tuple[torch.Tensor, Mark]]
    watch: ValueWatch

    def is_current(self) -> bool:
        """Whether nothing has been written since, as far as versions and looks tell."""
        if self.versions != tensor_versions(self.tensors):
            return False
        if not self.pairs or capturing(self.tensors[0].device):
            return True
        if self.watch.read(self.pairs):
            return False
        self.watch.look_again()
        return True


def tensor_versions(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Return what differs after a change in place, and after `tensor.data = other`."""
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]


def _prepare_once(weights: ExpertWeights, kernel: str) -> tuple[Callable[..., torch.Tensor], tuple]:
    """Return (operator, arguments), those of the last call where no tensor has changed since."""
    if torch.compiler.is_compiling():
        return _prepare(weights, kernel)
    entries = _prepared.setdefault(weights, {})
    entry = entries.get(kernel)
    if entry is not None and entry.is_current():
        return entry.call
    tensors = tuple(weights.tensors().values())
    if any(type(t) not in PLAIN for t in tensors):
        return _prepare(weights, kernel)
    versions, call = tensor_versions(tensors), _prepare(weights, kernel)
    _, arguments = call
    if all(type(t) in PLAIN for t in arguments if isinstance(t, torch.Tensor)):
        pairs = []
        copied = arguments[0].data_ptr() != weights.gate_up.packed.data_ptr()
        if copied and not capturing(tensors[0].device):
            pairs = [(tensor, Mark(tensor)) for tensor in tensors]
        entries[kernel] = found = _Prepared(tensors, versions, call, pairs, ValueWatch())
        if pairs:
            found.watch.look(pairs)
    return call


def _prepare(weights: ExpertWeights, kernel: str) -> tuple[Callable[..., torch.Tensor], tuple]:
    own = has_own_operator(weights.format, weights.biased)
    operator = torch.ops.fp4moe.nvfp4_moe if own else torch.ops.fp4moe.moe
    prepared = get_kernel(kernel).prepare(weights, hidden_alignment=DEFAULT_HIDDEN_ALIGNMENT)
    return operator.default, nvfp4_moe_arguments(prepared, kernel)
