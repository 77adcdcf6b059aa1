"""save_pretrained and push_to_hub of a model with packed weights: refused before a file is written.

What they would write has names that no class knows: a reload would draw the experts at random.
"""

from __future__ import annotations

import functools
from typing import Any

from ..errors import UnsupportedError, must
from ..linear import FP8Linear, NVFP4Linear
from ..module import FusedExperts

__all__ = ["refuse_to_save"]

PACKED = (FusedExperts, NVFP4Linear, FP8Linear)


def refuse_to_save(model_class: Any) -> None:
    """Make transformers' PreTrainedModel refuse by name; safe to repeat.

    On the class, since a model can hold packed experts at any depth, and from its first call on.
    """
    for name in ("save_pretrained", "push_to_hub"):
        plain = getattr(model_class, name)
        if not hasattr(plain, "for_fp4moe"):
            setattr(model_class, name, _refusing(plain))


def _refusing(plain: Any) -> Any:
    @functools.wraps(plain)
    def save(self, *args, **kwargs):
        # With an adapter of transformers' own integration only the adapter is written.
        if not getattr(self, "_hf_peft_config_loaded", False):
            packed = (path for path, m in self.named_modules() if isinstance(m, PACKED))
            if (path := next(packed, None)) is not None:
                must(
                    f"{plain.__name__}: model",
                    "hold float weights",
                    f"a {type(self).__name__} whose {path} is packed",
                    "Write a checkpoint with fp4moe.quantize_checkpoint, or keep "
                    "model.state_dict() with torch.save.",
                    error=UnsupportedError,
                )
        return plain(self, *args, **kwargs)

    save.for_fp4moe = True  # type: ignore[attr-defined]
    return save
