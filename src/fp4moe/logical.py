"""The logical tensors of a module whose buffers hold a kernel's layout: reading and handing out.

torch promises that a state_dict refers to the module's own tensors. Where a kernel has a layout of
its own it holds copies, and a write to one, as loops over two state_dicts make, would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .errors import refuse

__all__ = ["Lent", "logical_tensor"]


def logical_tensor(name: str) -> property:
    """Make the attribute of FusedExperts that shows a tensor of its state_dict."""

    def get(self: Any) -> torch.Tensor | None:
        tensors = self._logical(self.prepared)
        return next((t for dotted, t in tensors.items() if dotted.replace(".", "_") == name), None)

    def set_alone(self: Any, value: object) -> None:
        refuse(
            type(self).__name__,
            f"{name} cannot be set alone",
            "the kernel reads another layout of it",
            "Call load_state_dict, or give torch.func.functional_call the named_parameters and "
            "named_buffers, not a state_dict.",
        )

    return property(get, set_alone, doc=f"{name} as the state_dict holds it; undoes the layout.")


class Lent:
    """Watches the tensors of a state_dict that are not what the kernel reads.

    Args:
        handed_out: tensors by name.
        own: what the kernel reads; a tensor that shares memory with it needs no watch.
    """

    def __init__(
        self,
        handed_out: Mapping[str, torch.Tensor] | None = None,
        own: tuple[torch.Tensor, ...] = (),
    ):
        places = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.marks = [
            (name, _version_mark(tensor), tensor._version)
            for name, tensor in (handed_out or {}).items()
            if not (tensor.is_inference() or tensor.is_meta)
            and tensor.untyped_storage().data_ptr() not in places
        ]

    def check(self, module: Any) -> None:
        """Refuse to go on with weights whose copies were written to."""
        changed = [name for name, mark, version in self.marks if mark._version != version]
        if changed:
            refuse(
                type(module).__name__,
                "the layer cannot run",
                f"{', '.join(changed)} of its state_dict() were written to, which are copies in "
                f"another layout than kernel {module.kernel} reads",
                "Call load_state_dict with them.",
            )

    def __reduce__(self) -> tuple[type[Lent], tuple[()]]:
        # A copy of the module has handed out nothing.
        return Lent, ()


def _version_mark(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that counts the writes to the given one and keeps none of its memory."""
    mark = tensor.detach()
    mark.data = tensor.new_empty(0)
    return mark
