"""save_pretrained and push_to_hub of a model with packed weights: refused before a file is written.

What they would write has names that no class knows: a reload would draw the experts at random.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from .errors import refuse

__all__ = ["PackedModule"]

MODELS = "transformers.modeling_utils"


class PackedModule(nn.Module):
    """A module that holds packed weights, alone or in a model of transformers.

    Whoever makes or unpickles one makes transformers' models refuse to be saved while they hold
    any. Without transformers there is nothing to refuse.
    """

    def __init__(self) -> None:
        super().__init__()
        _refuse_to_save()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _refuse_to_save()


def _refuse_to_save() -> None:
    # On the class, since a model can hold packed modules at any depth.
    model_class = getattr(sys.modules.get(MODELS), "PreTrainedModel", None)
    for name in ("save_pretrained", "push_to_hub") if model_class else ():
        plain = getattr(model_class, name)
        if not hasattr(plain, "for_fp4moe"):
            setattr(model_class, name, _refusing(plain))


def _refusing(plain: Any) -> Any:
    @functools.wraps(plain)
    def save(self, *args, **kwargs):
        # With an adapter of transformers' own integration only the adapter is written.
        if not getattr(self, "_hf_peft_config_loaded", False):
            packed = (path for path, m in self.named_modules() if isinstance(m, PackedModule))
            if (path := next(packed, None)) is not None:
                refuse(
                    plain.__name__,
                    f"a {type(self).__name__} whose {path} is packed cannot be written",
                    "the files would hold what only its kernel reads",
                    "Write a checkpoint with fp4moe.quantize_checkpoint, or keep "
                    "model.state_dict() with torch.save.",
                )
        return plain(self, *args, **kwargs)

    save.for_fp4moe = True  # type: ignore[attr-defined]
    return save
