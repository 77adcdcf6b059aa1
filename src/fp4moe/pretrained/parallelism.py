"""transformers' tensor and expert parallelism: refused while packed experts cannot be sharded."""

from __future__ import annotations

from typing import Any

from ..errors import refuse

__all__ = ["refuse_parallelism"]

# From here on transformers adds up the shards of modules that hold buffers only, too.
FIRST = (5, 23)


def refuse_parallelism(
    distributed_config: Any = None, *, tp_plan: Any = None, tp_size: int | None = None
) -> None:
    """Refuse what would shard the experts; the arguments are those of from_pretrained.

    Raises:
        UnsupportedError: tensor or expert parallelism is asked for.
    """
    asked = {"tp_plan": tp_plan, "tp_size": tp_size}
    # A dictionary is what an earlier run left in config.json, and asks for nothing.
    if distributed_config is not None and not isinstance(distributed_config, dict):
        names = ("tp_plan", "tp_size", "ep_plan", "ep_size", "enable_expert_parallel")
        asked |= {name: getattr(distributed_config, name, None) for name in names}
        # Filled in by transformers; one rank shards nothing.
        sizes = [asked.get("tp_size") or 1, asked.get("ep_size") or 1]
        if max(sizes) == 1 and not asked["enable_expert_parallel"]:
            return
    asked = {name: value for name, value in asked.items() if value}
    if not asked or asked == {"tp_size": 1}:
        return
    import transformers

    reason = "packed experts are not sharded yet, every rank would keep all of them or fail"
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < FIRST:
        reason = (
            "transformers older than 5.23 does not add up the shards of modules without "
            f"parameters, and this is {transformers.__version__}"
        )
    given = ", ".join(f"{name}={str(value)[:60]}" for name, value in asked.items())
    refuse(
        "from_pretrained",
        f"the model cannot be loaded with {given}",
        reason,
        "Load without it, or pass device_map to use several GPUs.",
    )
