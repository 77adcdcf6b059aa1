"""save_pretrained and push_to_hub of transformers' models while they hold packed weights.

Decides: that they are checked before a file is written, at whatever depth packed modules lie. What
is written: models/save.py, which makes itself known here when something of a model is packed.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .errors import refuse

__all__ = ["PackedModule", "packed_left_out", "set_writer"]

MODELS = "transformers.modeling_utils"
# (model, name of the method, what it would do, its arguments) -> what it returns.
Writer = Callable[[Any, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_writer: Writer | None = None
_left_out = contextvars.ContextVar("left_out", default=False)


def set_writer(writer: Writer) -> None:
    """Name what saves a model of transformers that holds packed modules."""
    global _writer
    _writer = writer


@contextlib.contextmanager
def packed_left_out() -> Iterator[None]:
    """Leave packed modules out of every state_dict: their logical copies would take memory."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


class PackedModule(nn.Module):
    """A module that holds packed weights, alone or in a model of transformers.

    Whoever makes or unpickles one puts the check in front of what saves transformers' models.
    Without transformers there is nothing to check.
    """

    def __init__(self) -> None:
        super().__init__()
        _watch_saving()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _watch_saving()

    def state_dict(self, *args, **kwargs):
        """Return the logical tensors, see torch; nothing under `packed_left_out`."""
        if _left_out.get():
            return kwargs.get("destination", {})
        return super().state_dict(*args, **kwargs)


def _watch_saving() -> None:
    # On the class, since a model can hold packed modules at any depth.
    model_class = getattr(sys.modules.get(MODELS), "PreTrainedModel", None)
    for name in ("save_pretrained", "push_to_hub") if model_class else ():
        plain = getattr(model_class, name)
        if not hasattr(plain, "for_fp4moe"):
            setattr(model_class, name, _checked(plain))


def _checked(plain: Any) -> Any:
    @functools.wraps(plain)
    def save(self, *args, **kwargs):
        # With an adapter of transformers' own integration only the adapter is written.
        if getattr(self, "_hf_peft_config_loaded", False) or not _is_packed(self):
            return plain(self, *args, **kwargs)
        if _writer is None:
            refuse(
                plain.__name__,
                f"a {type(self).__name__} cannot be written",
                "its packed modules were not put there by fp4moe.replace_moe or from_pretrained",
                "Use one of them, or keep model.state_dict() with torch.save.",
            )
        return _writer(self, plain.__name__, plain, args, kwargs)

    save.for_fp4moe = True  # type: ignore[attr-defined]
    return save


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedModule) for module in model.modules())
