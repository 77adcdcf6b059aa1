"""How transformers sees a model with packed weights: as quantised, by an HfQuantizer of ours.

`Trainer`, `.half()`, `save_pretrained` and others ask a model for its quantizer. What is written:
models/save.py. Its part in from_pretrained: pretrained/quantizer.py, which derives from it.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..checkpoint.safetensors_writer import write_file
from ..errors import refuse
from ..saving import set_writer
from .save import Saved, lent_attribute

__all__ = ["METHOD", "findable", "mark_quantized", "quantizer_classes"]

# The quantization method of a model that is packed here; never written to a file.
METHOD = "fp4moe"


@functools.cache
def quantizer_classes() -> tuple[Any, Any]:
    """Make the classes that derive from transformers': the configuration and the quantizer."""
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Fp4MoeConfig(QuantizationConfigMixin):
        """Says that a model's experts are packed; entries: of the checkpoint that it came from."""

        def __init__(self, quant_method: str = METHOD, **entries: Any):
            self.quant_method: Any = quant_method
            self.options = entries.pop("fp4moe_options", None)
            self.entries = entries

        @classmethod
        def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
            config = cls(**config_dict)
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method, **self.entries}

    class PackedQuantizer(HfQuantizer):
        """What transformers asks of a quantised model once it is there."""

        is_trainable = True
        is_compileable = True
        # The state dict that is being saved, while it is.
        saving: Any = None

        def is_serializable(self) -> bool:
            return True

        def get_state_dict_and_metadata(self, model):
            return (None, {}) if self.saving is None else (self.saving(), {})

        def _dequantize(self, model, dtype=None):
            refuse(
                "dequantize",
                f"a {type(model).__name__} cannot be dequantised",
                "its float experts are gone",
                "Load the float checkpoint.",
            )

    return findable(__name__, Fp4MoeConfig), findable(__name__, PackedQuantizer)


def findable(module: str, kind: type) -> type:
    """Make a class that was made inside a function one of its module, so that it pickles."""
    kind.__qualname__ = kind.__name__
    setattr(sys.modules[module], kind.__name__, kind)
    return kind


def __getattr__(name: str) -> Any:
    # A process that unpickles a model has not made the classes yet.
    if name in ("Fp4MoeConfig", "PackedQuantizer"):
        return next(kind for kind in quantizer_classes() if kind.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mark_quantized(model: nn.Module) -> None:
    """Give the models of transformers in a module that was packed a quantizer.

    Only the outermost ones get it, as from_pretrained does, unless they have one. Configurations
    stay as they are: other models may share them.
    """
    for owner in _outermost(model):
        if getattr(owner, "hf_quantizer", None) is None:
            kind, quantizer = quantizer_classes()
            owner.hf_quantizer = quantizer(kind(), pre_quantized=False)
            owner.quantization_method = METHOD
            owner.is_quantized = True


def _outermost(model: nn.Module) -> Iterator[Any]:
    models = sys.modules.get("transformers.modeling_utils")
    if models is None:
        return
    if isinstance(model, models.PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def _save(
    model: Any, caller: str, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Do what `plain`, the save_pretrained or push_to_hub of a model, does.

    Raises:
        UnsupportedError: the model cannot be written; no file and no repository is there yet.
    """
    if caller == "push_to_hub":
        # It makes a repository before it calls save_pretrained.
        Saved.of(model, None, True, caller)
        return plain(model, *args, **kwargs)
    call = inspect.signature(plain).bind(model, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if given["distributed_checkpoint"]:
        what = f"a {type(model).__name__} with packed weights cannot be written"
        reason = "a distributed checkpoint has no place for them"
        refuse(caller, what, reason, "Leave distributed_checkpoint out.")
    saved = Saved.of(model, given["state_dict"], given["save_original_format"], caller)
    # Names are made here, since packed tensors have none that transformers would know.
    given["save_original_format"] = False

    def tensors() -> dict[str, Any]:
        if given["is_main_process"]:
            path = os.path.join(given["save_directory"], "hf_quant_config.json")
            write_file(path, json.dumps(saved.legacy, indent=2).encode())
        return saved.tensors()

    kind, quantizer_class = quantizer_classes()
    quantizer = quantizer_class(kind(), pre_quantized=False)
    quantizer.saving = tensors
    with (
        lent_attribute(model, "hf_quantizer", quantizer),
        lent_attribute(model.config, "quantization_config", saved.current),
    ):
        return plain(*call.args, **call.kwargs)


set_writer(_save)
