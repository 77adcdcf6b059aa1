"""What packed modules are called in a saved model, and what of them cannot be saved.

Names are those that transformers itself gives the float model: a twin on the meta device goes
through its renaming, and checkpoint/float_experts.py says what `fp4moe quantize` makes of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..checkpoint.float_experts import Experts, FloatMatrix, find_float_experts
from ..checkpoint.header import Spec
from ..checkpoint.modelopt import MODELOPT_NAMES
from ..errors import CheckpointError, UnsupportedError
from ..linear import PackedLinear
from ..module import FusedExperts
from ..saving import PackedModule
from .experts_module import FUSED_CHILD, find_experts
from .from_config import float_twin

__all__ = ["Names", "check_state", "packed_modules", "stored_form", "stored_forms"]

Refuse = Callable[..., NoReturn]
Rename = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclasses.dataclass
class Names:
    """What the packed modules of a model are called in its files.

    Attributes:
        experts: path of each experts module -> its matrices as the float checkpoint names them.
        linears: path of each quantised Linear -> the same, as a layer of one matrix.
        shapes: key -> (dtype, shape) of all these in the float checkpoint.
    """

    experts: dict[str, Experts] = dataclasses.field(default_factory=dict)
    linears: dict[str, Experts] = dataclasses.field(default_factory=dict)
    shapes: dict[str, Spec] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, packed: Mapping[str, nn.Module], rename: Rename, caller: str, no: Refuse
    ) -> Names:
        """Ask the model's class for them.

        Args:
            packed: what `packed_modules` returned.
            rename: what transformers does to the names of a state dict that it saves.
            no: raises with (reason, advice); what it refuses is the model.
        """
        try:
            twin = float_twin(model, caller=caller)
        except CheckpointError as error:
            no("its class cannot be asked for the names of float weights", cause=error)
        names, floats = cls(), twin.state_dict()
        storages = {found.path: found.storage for found in find_experts(twin)}
        for path, module in packed.items():
            if isinstance(module, FusedExperts):
                place = path.removesuffix(f".{FUSED_CHILD}")
                own = {key: t for key, t in floats.items() if key.startswith(f"{place}.")}
                found = _specs(rename(own))
                storage = storages.get(place)
                ways = {place: (storage.layout, storage.transposed)} if storage else {}
                names.experts[path] = _layer(path, module, found, ways, no)
                names.shapes |= found
        linears = {path: m for path, m in packed.items() if isinstance(m, PackedLinear)}
        weights = {path: floats.get(f"{path}.weight") for path in linears}
        known = {f"{path}.weight": t for path, t in weights.items() if t is not None}
        # The very tensor comes back where it is only renamed.
        keys = {id(tensor): key for key, tensor in rename(known).items()}
        for path, module in linears.items():
            weight, size = weights[path], (module.out_features, module.in_features)
            if weight is None or id(weight) not in keys or tuple(weight.shape) != size:
                no(f"its float checkpoint has no weight {list(size)} of its own for {path}")
            key = keys[id(weight)]
            names.shapes[key] = (weight.dtype, size)
            part = FloatMatrix(key.removesuffix(".weight"), key, (), size, 0)
            names.linears[path] = Experts(part.name, 1, [(part,)], [])
        return names


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Return every packed module by path, at each place where it is used."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, PackedModule)}


def check_state(model: Any, tensors: Mapping[str, torch.Tensor], no: Refuse) -> None:
    """Refuse a model whose tensors are not all here, or that another quantizer has changed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not hasattr(quantizer, "saving"):
        no(f"{type(quantizer).__name__} has quantised the rest of it")
    away = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        advice = "Load the model onto devices that hold it."
        no(f"{away} is on the meta device, not loaded or offloaded", advice)
    holders = packed_modules(model).items()
    part = next((f"{path} holds {m.parts[0]}" for path, m in holders if m.parts), None)
    if part is not None:
        no(part, "Save it from one process that holds all of it.")
    split = next((key for key, tensor in tensors.items() if hasattr(tensor, "placements")), None)
    if split is not None:
        no(f"{split} is split over processes", "Save it from one process that holds all of it.")


def stored_form(module: Any) -> str:
    """Return the format of a packed module."""
    return module.layer.format if isinstance(module, FusedExperts) else module.format


def stored_forms(packed: Mapping[str, nn.Module], no: Refuse) -> dict[str, bool]:
    """Return each format of packed modules, and whether these have activation ranges."""
    found: dict[str, dict[bool, str]] = {}
    for path, module in packed.items():
        form = stored_form(module)
        if isinstance(module, FusedExperts):
            stored, scales = "input_scale" in MODELOPT_NAMES[form], module.activation_scales()
            calibrated = stored and any(bool((scale != 1).any()) for scale in scales)
        else:
            calibrated = module.input_scale is not None
        found.setdefault(form, {}).setdefault(calibrated, path)
    for form, ranges in found.items():
        if len(ranges) > 1:
            no(
                f"{ranges[True]} has activation ranges and {ranges[False]} has none: a checkpoint "
                f"has them for all {form.upper()} modules or for none",
                "Calibrate all layers, or set the scales of experts back to 1 with "
                "set_activation_scales(1, 1).",
            )
        if True in ranges and "input_scale" not in MODELOPT_NAMES[form]:
            no(f"ModelOpt's {form.upper()} has no activation ranges, and {ranges[True]} has one")
    return {form: next(iter(ranges)) for form, ranges in found.items()}


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def _layer(
    path: str,
    module: FusedExperts,
    shapes: dict[str, Spec],
    storages: dict[str, tuple[str, bool]],
    no: Refuse,
) -> Experts:
    """Find the names of one layer; refuse what does not hold all of it."""
    layer = module.layer
    local = module.prepared.operands.down_packed.shape[0]
    if local != layer.num_experts:
        reason = f"{path} holds {local} of {layer.num_experts} experts"
        no(reason, "Save it from one process that holds all of them.")
    if not shapes:
        no(f"its class has no float experts at {path}")
    try:
        found, _ = find_float_experts(shapes, [""], None, storages, layer.format)
    except (CheckpointError, UnsupportedError) as error:
        why, advice = str(error).partition(". ")[0], "Keep model.state_dict() with torch.save."
        no(f"{path} has no place in ModelOpt's layout: {why}", advice, cause=error)
    parts = found[0].first[0]
    wanted = layer.num_experts, 1 + layer.gated, (layer.intermediate_size, layer.hidden_size)
    if len(found) != 1 or (found[0].count, len(parts), parts[0].shape) != wanted:
        no(
            f"{path} holds {layer.num_experts} experts of {layer.hidden_size} x "
            f"{layer.intermediate_size}, unlike those of its configuration",
            "Save it from one process that holds all of them.",
        )
    return found[0]
