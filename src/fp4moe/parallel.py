"""Several processes that run one model: what they must agree on, and experts for all batches.

Exchanges are torch's functional collectives, which stay inside one compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .errors import CheckpointError, must, refuse

__all__ = ["GATHER", "Exchange", "check_alike", "check_all_succeed", "gather_objects"]

# The name of the exchange with an own batch in each process, as an ep_implementation.
GATHER = "fp4moe_gather"


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Return the value of every process of a group, in their order; None: of all there are.

    A collective where there are several.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return found


def check_alike(value: str, argument: str, advice: str, group: Any = None) -> None:
    """Raise CheckpointError, in every process of a group, unless all have the same value.

    A collective of these processes.
    """
    found = gather_objects(value, group)
    others = [rank for rank, other in enumerate(found) if other != found[0]]
    if others:
        must(
            argument,
            "be the same in all processes",
            f"{found[0]} in process 0 and {found[others[0]]} in process {others[0]}",
            advice,
            error=CheckpointError,
        )


def check_all_succeed(caller: str, error: BaseException | None) -> None:
    """Raise CheckpointError where another process failed: it would be waited for.

    A collective of all processes. Args: error: what this process raises after the call.
    """
    found = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    failed = {rank: text for rank, text in enumerate(found) if text is not None}
    if failed and error is None:
        rank, text = next(iter(failed.items()))
        refuse(
            caller,
            "the model cannot be loaded",
            f"process {rank} failed: {str(text)[:500].rstrip('.')}",
            "Mend that and start all processes again.",
            error=CheckpointError,
        )


class Exchange:
    """Experts that processes share, each with a batch of its own: gather, run, scatter the sums.

    Every process must call it with equally many tokens in every step; that is not checked, since a
    check is one more exchange.

    Args:
        group: of the processes that hold the experts between them.
        sharers: of those of them that hold the same batch as this one, None where no other does.
    """

    def __init__(self, group: Any, sharers: Any = None):
        # Their names, which can be copied and pickled.
        self.group = group.group_name
        self.sharers = "" if sharers is None else sharers.group_name
        self.sharing = 1 if sharers is None else dist.get_world_size(sharers)
        self.index = 0 if sharers is None else dist.get_rank(sharers)

    def __call__(
        self,
        experts: Callable[..., torch.Tensor],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Run `experts` on the tokens of all processes; return the sums for those given here.

        Args: hidden [T, H], ids [T, K] and weights [T, K], which `experts` takes, too.
        """
        tokens = hidden.shape[0]
        if self.sharing > 1:
            hidden, ids, weights = self._slices(hidden, ids, weights)
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            if self.sharing > 1:
                refuse(
                    GATHER,
                    "there are no gradients",
                    "several processes hold one batch",
                    "Train with tp_size=1, or with another ep_implementation.",
                )
            gather, scatter = _collective("all_gather", True), _collective("reduce_scatter", True)
            ids = _collective("all_gather")(ids.to(torch.int32), 0, self.group)
            weights = gather(weights.contiguous(), 0, self.group)
        else:
            gather, scatter = _collective("all_gather"), _collective("reduce_scatter")
            # One exchange for both.
            bits = weights.float().contiguous().view(torch.int32)
            both = gather(torch.cat((ids.to(torch.int32), bits), 1), 0, self.group)
            ids, bits = both.chunk(2, 1)
            weights = bits.contiguous().view(torch.float32)
        hidden = gather(hidden.contiguous(), 0, self.group)
        out = scatter(experts(_done(hidden), _done(ids), _done(weights)), "sum", 0, self.group)
        return _done(out if self.sharing == 1 else gather(out, 0, self.sharers)[:tokens])

    def _slices(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those rows of one batch that this process brings: as many as every other, zeros behind.

        A padded row chooses expert 0 with weight 0.
        """
        each = -(-tensors[0].shape[0] // self.sharing)
        more = each * self.sharing - tensors[0].shape[0]
        start = self.index * each
        return tuple(F.pad(t, (0, 0, 0, more))[start : start + each] for t in tensors)


def _done(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor once its exchange is over; a graph waits by itself."""
    wait = None if torch.compiler.is_compiling() else getattr(tensor, "wait", None)
    return tensor if wait is None else wait()


def _collective(name: str, with_gradient: bool = False) -> Callable[..., torch.Tensor]:
    """A functional collective of torch, which 2.13 has renamed."""
    from torch.distributed import _functional_collectives as functional

    end = "_autograd" * with_gradient
    old = f"{name}_tensor{end}"
    return getattr(functional, f"{name}_single{end}", None) or getattr(functional, old)
