"""Several processes that run one model: what they must agree on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .errors import CheckpointError, must, refuse

__all__ = ["GATHER", "check_alike", "check_all_succeed", "gather_objects"]

# The name of the exchange with an own batch in each process, as an ep_implementation.
GATHER = "fp4moe_gather"


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every process, in their order; a collective where there are several."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check_alike(value: str, argument: str, advice: str) -> None:
    """Raise CheckpointError, in every process, unless all have the same value.

    A collective of all processes.
    """
    found = gather_objects(value)
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
