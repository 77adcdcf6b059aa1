"""Recorders: what `calibrate` hooks into a block of experts to see its activations.

The intermediate is computed once more, in float32, from the weights that the module holds, so that
it does not matter how the model runs its experts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..activations import Activation, get_activation
from ..errors import check_choice, must, refuse
from ..experts import ExpertWeights
from ..formats import DEFAULT_FORMAT, FORMATS
from ..fused import tensor_versions
from ..kernels import PreparedWeights
from ..models.block import ACTIVATION_SCALES, Candidate
from ..models.replace import find_candidates
from ..module import FusedExperts
from ..precision import without_autocast
from .ranges import Ranges

__all__ = ["BlockRanges", "Recorder", "activation_range", "make_recorders"]

logger = logging.getLogger("fp4moe")
DYNAMIC = "its kernels compute the scales of activations from each input"
# (local expert, rows [N, H] float32) -> input of down [N, I] float32.
Inner = Callable[[int, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BlockRanges:
    """What one block has seen.

    Attributes:
        path: dotted name of the block.
        tokens: of each local expert.
        hidden_range: of the block's input.
        intermediate_ranges: of the input of down, one for each local expert. An expert without a
            value other than 0 has the largest of the others.
        format: whose scales the properties are: that of fused experts, else the default one.
    """

    path: str
    tokens: tuple[int, ...]
    hidden_range: float
    intermediate_ranges: tuple[float, ...]
    format: str = DEFAULT_FORMAT

    @property
    def hidden_scale(self) -> float:
        """Scale (decode multiplier) of the input."""
        return self.scales(self.format)[0]

    @property
    def intermediate_scale(self) -> tuple[float, ...]:
        """Scales of the inputs of down."""
        return self.scales(self.format)[1]

    def scales(self, format: str) -> tuple[float, tuple[float, ...]]:
        """Return (that of the input, those of the inputs of down) for a format that has them."""
        range = activation_range(format, caller="BlockRanges.scales")
        return self.hidden_range / range, tuple(v / range for v in self.intermediate_ranges)


def activation_range(format: str, *, caller: str) -> float:
    """Return what a scale of 1 expresses in that format.

    Raises:
        UnsupportedError: no such format, or it has no scales to calibrate.
    """
    check_choice("format", format, FORMATS, caller=caller)
    range = FORMATS[format].activation_range
    if range is None:
        refuse(caller, f"format {format} needs no calibration", DYNAMIC, "Leave it out.")
    return range


def _scales(block: BlockRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """[1] and [E] float32 global scales of the input and of the inputs of down."""
    hidden = torch.tensor([block.hidden_scale], dtype=torch.float32, device="cpu")
    return hidden, torch.tensor(block.intermediate_scale, dtype=torch.float32, device="cpu")


class Recorder:
    """The ranges of one block, and the hooks that feed them."""

    def __init__(self, path: str, module: Any, experts: int, percentile: float | None):
        self.path, self.module = path, module
        self.tokens = [0] * experts
        self.hidden = Ranges(1, percentile)
        self.intermediate = Ranges(experts, percentile)

    @property
    def format(self) -> str:
        """Number format of the block's weights, the default one where they are not packed."""
        return DEFAULT_FORMAT

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks; returns their handles."""
        raise NotImplementedError

    def record(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, offset: int, inner: Inner
    ) -> None:
        """Take [T, H] and [T, K] global ids; ids of no local expert are left out."""
        x = hidden.detach()
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for expert in torch.unique(expert_ids).tolist():
            local = expert - offset
            if 0 <= local < len(self.tokens):
                hit = (expert_ids == expert).any(1)
                reached |= hit
                self.tokens[local] += int(hit.sum())
                with torch.no_grad(), without_autocast(x.device):
                    self.intermediate.add(local, inner(local, x[hit].float()))
        self.hidden.add(0, x[reached])

    def result(self) -> BlockRanges:
        """Return the ranges, checked."""
        largest = (float(self.hidden.amax.max()), float(self.intermediate.amax.max()))
        if not all(0 < value < float("inf") for value in largest):
            must(
                f"calibrate: activations of {self.path}",
                "be finite and not all zero",
                f"a largest input of {largest[0]:g} and a largest intermediate of {largest[1]:g}",
                "Find the layer that made them.",
            )
        ranges = self.intermediate.values()
        ranges = torch.where(ranges > 0, ranges, ranges.max())
        hidden = float(self.hidden.values())
        found = hidden, tuple(ranges.tolist())
        return BlockRanges(self.path, tuple(self.tokens), *found, self.format)

    def store(self, block: BlockRanges) -> None:
        """Leave the scales with the float module, for whoever packs it."""
        setattr(self.module, ACTIVATION_SCALES, _scales(block))


class _FusedRecorder(Recorder):
    """FusedExperts."""

    module: FusedExperts

    @property
    def format(self) -> str:
        return self.module.layer.format

    _logical: tuple[PreparedWeights, list[tuple[int, int]], ExpertWeights] | None = None

    def weights(self) -> ExpertWeights:
        """Return the logical weights: the layout is undone once, and again where it has changed."""
        prepared = self.module.prepared
        versions = tensor_versions(prepared.tensors().values())
        if self._logical is None or self._logical[1] != versions:
            # What was undone is held, so that no other tensor can take its address.
            self._logical = prepared, versions, self.module.weights
        return self._logical[2]

    def attach(self) -> list[RemovableHandle]:
        return [self.module.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, module: nn.Module, args: Sequence, kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        hidden, ids, _ = _positional(names, args, kwargs)
        weights = self.weights()
        activation = get_activation(weights.activation)

        def inner(expert: int, rows: torch.Tensor) -> torch.Tensor:
            parts = weights.slice_experts(expert, expert + 1).dequantize()
            return _into_down(parts, rows, activation)

        self.record(hidden, ids, weights.expert_offset, inner)

    def store(self, block: BlockRanges) -> None:
        self.module.set_activation_scales(block.hidden_scale, _scales(block)[1])


class _StackedRecorder(Recorder):
    """An experts module with stacked weights, such as those of transformers."""

    def __init__(self, candidate: Candidate, percentile: float | None):
        experts = candidate.num_experts or 0
        super().__init__(candidate.path, candidate.module, experts, percentile)
        assert candidate.storage and candidate.activation
        self.storage, self.activation = candidate.storage, get_activation(candidate.activation)
        # The classes call their arguments by various names.
        self.names = [*inspect.signature(type(candidate.module).forward).parameters][1:]

    def attach(self) -> list[RemovableHandle]:
        return [self.module.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, module: Any, args: Sequence, kwargs: dict[str, Any]) -> None:
        hidden, ids, _ = _positional(self.names, args, kwargs)

        def inner(expert: int, rows: torch.Tensor) -> torch.Tensor:
            one = {n: getattr(module, n)[expert : expert + 1] for n in self.storage.names}
            return _into_down(self.storage.split(one), rows, self.activation)

        self.record(hidden, ids, 0, inner)


class _ListRecorder(Recorder):
    """A block that loops over expert MLPs; each MLP and its down Linear show their inputs."""

    def __init__(self, candidate: Candidate, percentile: float | None):
        experts = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in candidate.parameters))
        super().__init__(candidate.path, candidate.module, len(experts), percentile)
        # A candidate lists the weights of an expert together, down last.
        downs = {n.rsplit(".", 2)[0]: n.rpartition(".")[0] for n in candidate.parameters}
        block = candidate.module
        self.parts = [(block.get_submodule(e), block.get_submodule(downs[e])) for e in experts]

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for index, (expert, down) in enumerate(self.parts):
            handles.append(expert.register_forward_pre_hook(functools.partial(self._input, index)))
            handles.append(down.register_forward_pre_hook(functools.partial(self._inner, index)))
        return handles

    def _input(self, index: int, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        self.tokens[index] += args[0].shape[:-1].numel()
        self.hidden.add(0, args[0])

    def _inner(self, index: int, module: nn.Module, args: tuple[torch.Tensor]) -> None:
        self.intermediate.add(index, args[0])


def _into_down(
    parts: Mapping[str, torch.Tensor], rows: torch.Tensor, activation: Activation
) -> torch.Tensor:
    """What one expert's down projection takes; parts are [1, ...], see ExpertWeights.dequantize."""
    gate, up = (
        F.linear(rows, *(parts[n][0].float() for n in (name, f"{name}_bias") if n in parts))
        if name in parts
        else None
        for name in ("gate", "up")
    )
    assert up is not None
    return activation.combine(up, gate)


def _positional(names: Sequence[str], args: Sequence, kwargs: dict[str, Any]) -> list:
    return [*args, *(kwargs[name] for name in names[len(args) :])]


def make_recorders(model: nn.Module, percentile: float | None) -> list[Recorder]:
    """Return a recorder for each block that can be calibrated; logs the others."""
    fused = [(p, m) for p, m in model.named_modules() if isinstance(m, FusedExperts)]
    found: list[Recorder] = [
        _FusedRecorder(path, module, module.activation_scales()[1].numel(), percentile)
        for path, module in fused
        if FORMATS[module.layer.format].activation_range and not module.parts
    ]
    refused = [
        f"{path or 'the model'}: it holds {module.parts[0]}, and ranges are those of all of it"
        for path, module in fused
        if module.parts
    ]
    refused += [
        f"{path or 'the model'}: experts in {module.layer.format} need none, {DYNAMIC}"
        for path, module in fused
        if not FORMATS[module.layer.format].activation_range
    ]
    for candidate in find_candidates(model):
        if candidate.reasons:
            refused.append(f"{candidate.path or 'the model'}: {'; '.join(candidate.reasons)}")
        elif candidate.part is not None:
            why = "it is split over processes, and ranges are those of all of it"
            refused.append(f"{candidate.path}: {why}")
        elif candidate.storage is not None:
            found.append(_StackedRecorder(candidate, percentile))
        else:
            found.append(_ListRecorder(candidate, percentile))
    if not found:
        refuse(
            "calibrate",
            f"{type(model).__name__} cannot be calibrated",
            "it has no fused experts, and no experts that replace_moe takes"
            + "".join(f"; {why}" for why in refused),
            "See fp4moe.explain(model).",
        )
    for why in refused:
        logger.warning("calibrate: not calibrated: %s", why)
    return found
