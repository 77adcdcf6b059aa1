"""save_pretrained of a model with packed weights: ModelOpt's layout, written by transformers.

The files are those of `fp4moe quantize` on the float checkpoint of the same model: the same names,
dtypes, bytes and quantisation entries. Whatever cannot be written is refused before a file is
there. transformers cuts the tensors into files, writes the rest and uploads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch

from ..checkpoint.modelopt_writer import (
    exclude_modules,
    mixed_configs,
    quantization_configs,
    written,
    written_experts,
    written_scale,
)
from ..checkpoint.mtp import decoder_layers
from ..errors import refuse
from ..experts import ExpertWeights
from ..formats import StoredMatrix
from ..formats.base import SLOTS
from ..linear import NAMES
from ..module import FusedExperts
from ..saving import packed_left_out
from .saved_names import Names, check_state, packed_modules, stored_form, stored_forms

__all__ = ["Saved", "lent_attribute"]

State = Mapping[str, torch.Tensor]
KEEP = "Keep model.state_dict() with torch.save, or write a checkpoint with fp4moe quantize."


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is written of a model.

    Attributes:
        model, state: the model, and the state dict that is saved instead of its own, or None.
        names: of its packed modules.
        calibrated: format -> whether its modules have activation ranges.
        rename: what transformers does to the names of a state dict that it saves.
        legacy, current: hf_quant_config.json, and "quantization_config" for config.json.
    """

    model: Any
    state: State | None
    names: Names
    calibrated: dict[str, bool]
    rename: Callable[[State], dict[str, torch.Tensor]]
    legacy: dict[str, Any]
    current: dict[str, Any]

    @classmethod
    def of(cls, model: Any, state: State | None, original: bool, caller: str) -> Saved:
        """Find out what is written; original: under the names of its class's own files.

        Raises:
            UnsupportedError: it cannot be written.
        """

        def no(reason: str, advice: str = KEEP, **how: Any) -> NoReturn:
            what = f"a {type(model).__name__} with packed weights cannot be written"
            refuse(caller, what, reason, advice, **how)

        packed = packed_modules(model)
        for module in packed.values():
            lent: Any = getattr(module, "_lent", None)
            if state is None and lent is not None:
                lent.check(module)
        inside = {f"{p}.{n}": t for p, m in packed.items() for n, t in m.named_buffers()}
        rest = _rest(model, state)
        check_state(model, rest | inside, no)
        calibrated = stored_forms(packed, no)
        blank = {key: torch.empty_like(tensor, device="meta") for key, tensor in rest.items()}
        rename = _renaming(model, blank) if original else dict
        names = Names.of(model, packed, rename, caller, no)
        shapes = {key: (t.dtype, tuple(t.shape)) for key, t in rename(blank).items()}
        layers = names.experts | names.linears
        count = decoder_layers(model.config.to_dict())
        excluded = exclude_modules(shapes | names.shapes, layers.values(), count)
        if len(calibrated) == 1:
            ((form, ranges),) = calibrated.items()
            configs = quantization_configs(excluded, ranges, form)
        else:
            forms = {layer.module: stored_form(packed[p]) for p, layer in layers.items()}
            configs = mixed_configs(excluded, calibrated, forms)
        return cls(model, state, names, calibrated, rename, *configs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that is written, by its name in the files."""
        tensors = self.rename(_rest(self.model, self.state))
        biases = {key for key in self.names.shapes if key.endswith(".bias")}
        for path, layer in self.names.experts.items():
            biases_of = biases | {bias.name for bias in layer.biases}
            module = self.model.get_submodule(path)
            weights = _weights(path, module, self.state)
            how = {"calibrated": self.calibrated[weights.format]}
            tensors |= written_experts(layer, weights, biases_of, self.model.dtype, **how)
        for path, layer in self.names.linears.items():
            module = self.model.get_submodule(path)
            tensors |= _written_linear(layer.module, _own(path, module, self.state), module.format)
        return tensors


@contextlib.contextmanager
def lent_attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an object an attribute for a while."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        for old in before.values():
            setattr(owner, name, old)


def _renaming(model: Any, rest: State) -> Callable[[State], dict[str, torch.Tensor]]:
    """Return what makes the names of files out of those of the model.

    rest: what is not packed, on the meta device.

    transformers reverts the conversions that loading used. Packed experts were loaded past them, so
    that all conversions of the class count wherever these name the rest of it alike.
    """
    used = getattr(model, "_weight_conversions", None)
    alike = _renamed(model, None, rest).keys() == _renamed(model, used, rest).keys()
    return functools.partial(_renamed, model, None if alike else used)


def _renamed(model: Any, conversions: list[Any] | None, tensors: State) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    # None: those of the class.
    with lent_attribute(model, "_weight_conversions", conversions):
        return revert_weight_conversion(model, dict(tensors))


def _rest(model: Any, state: State | None) -> dict[str, torch.Tensor]:
    """What is not packed, without what transformers would not save."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    if state is None:
        with packed_left_out():
            tensors = dict(model.state_dict())
    else:
        packed = tuple(f"{path}." for path in packed_modules(model))
        tensors = {key: t for key, t in state.items() if not key.startswith(packed)}
    for key in model._keys_to_ignore_on_save or ():
        tensors.pop(key, None)
    return remove_tied_weights_from_state_dict(tensors, model)


def _own(path: str, module: Any, state: State | None) -> State:
    """The state dict of a packed module, of its own or out of one that was given."""
    own = module.state_dict()
    if state is None:
        return own
    return {name: state.get(f"{path}.{name}", tensor) for name, tensor in own.items()}


def _weights(path: str, module: FusedExperts, state: State | None) -> ExpertWeights:
    if state is None:
        return module.weights
    own = _own(path, module, state)
    names = module.weights.tensors()
    tensors = {name: own[name.replace(".", "_")] for name in names}
    return ExpertWeights.from_tensors(tensors, module.metadata)


def _written_linear(name: str, own: State, form: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is written of a quantised Linear: copies in the memory of the host."""
    own = {key: tensor.to("cpu", copy=True) for key, tensor in own.items()}
    scale = own[NAMES["block_scale"]]
    parts = {slot: own.get(NAMES[slot], scale.new_empty(0)) for slot in SLOTS}
    # One scale for all has no axes in the module.
    parts["block_scale"] = scale if scale.ndim else scale.reshape(1, 1)
    yield from written(name, StoredMatrix(**parts), form)
    if "input_scale" in own:
        yield written_scale(name, float(own["input_scale"]), form)
    if "bias" in own:
        yield f"{name}.bias", own["bias"]
