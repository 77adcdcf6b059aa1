"""What from_pretrained asks of transformers' tensor and expert parallelism, checked before loading.

Support begins with transformers 5.23 (models/sharding.py); older versions are refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import torch.distributed as dist

from ..checkpoint.files import CheckpointFiles
from ..errors import must, refuse
from ..models.sharding import is_supported

__all__ = ["check_parallelism", "fingerprint", "is_shared"]

SIZES = ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size")
# What is read of the end of a weight file: values, which headers do not show.
TAIL = 1 << 16


def check_parallelism(
    distributed_config: Any = None, *, tp_plan: Any = None, tp_size: int | None = None
) -> None:
    """Check what would split the model; the arguments are those of from_pretrained.

    Raises:
        UnsupportedError: this version of transformers splits packed experts wrongly, or layers
            would be dealt out (pp_size).
        ShapeError: the sizes do not multiply to the number of processes.
    """
    asked = {"tp_plan": tp_plan, "tp_size": tp_size}
    if distributed_config is not None:
        names = (*SIZES, "tp_plan", "ep_plan", "ep_size", "enable_expert_parallel")
        given = distributed_config if isinstance(distributed_config, dict) else {}
        asked |= {n: given.get(n, getattr(distributed_config, n, None)) for n in names}
    sizes = {name: asked.get(name) or 1 for name in SIZES}
    split = {
        name: value for name, value in asked.items() if value and (value is True or value != 1)
    }
    ready = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if ready else int(os.environ.get("WORLD_SIZE", 1))
    # Filled in by transformers; one process splits nothing.
    trivial = {"tp_plan"} if distributed_config is not None and world == 1 else set()
    if tp_plan is None and not split.keys() - trivial:
        return
    import transformers

    words = ", ".join(f"{name}={str(value)[:60]}" for name, value in split.items())
    what = f"the model cannot be loaded with {words}"
    if not is_supported(transformers.__version__) and not split.keys() <= set(SIZES[:3]):
        reason = (
            "transformers older than 5.23 does not add up the shards of modules without "
            f"parameters, and this is {transformers.__version__}"
        )
        refuse("from_pretrained", what, reason, "Load without it, or pass device_map.")
    if sizes["pp_size"] > 1:
        reason = "packed experts are not dealt out layer by layer"
        refuse("from_pretrained", what, reason, "Pass tp_size or ep_size, or device_map.")
    wanted = math.prod(sizes.values())
    if wanted not in (1, world):
        product = " * ".join(name for name in sizes if sizes[name] > 1)
        rule = f"be the number of processes, {world}"
        advice = f"Start as many with torchrun --nproc-per-node={wanted}."
        must(f"from_pretrained: {product}", rule, wanted, advice)


def is_shared(distributed_config: Any) -> bool:
    """Whether a configuration, as transformers has put it into that of the model, is for several.

    A dictionary is what an earlier run left in config.json.
    """
    if distributed_config is None or isinstance(distributed_config, dict):
        return False
    return any((getattr(distributed_config, name, None) or 1) > 1 for name in SIZES)


def fingerprint(files: CheckpointFiles, *options: object) -> str:
    """Return a text that differs for other checkpoints, wherever they lie, and other options.

    Read are config.json, the header of each file, its size and its last 64 KiB.
    """
    digest = hashlib.sha256(repr(options).encode())
    digest.update(repr((files.config, files.quantization)).encode())
    for name in sorted(files.shards):
        digest.update(repr((name, sorted(files.shards[name]))).encode())
        digest.update(repr([files.shapes[key] for key in sorted(files.shards[name])]).encode())
        with open(os.path.join(files.directory, name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            digest.update(str(size).encode() + file.read())
    return digest.hexdigest()[:16]
