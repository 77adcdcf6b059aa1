"""`fp4moe.quantize_checkpoint`: whether transformers will load the result is asked here."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.float_experts import Storages
from ..checkpoint.float_linears import NONE
from ..checkpoint.write_plan import Calibration
from ..checkpoint.writer import FOR_OTHERS, WriteReport, write_checkpoint
from ..errors import CheckpointError
from ..formats import DEFAULT_FORMAT
from ..models.experts_module import find_experts
from ..models.from_config import experts_refusals, model_on_meta

__all__ = ["quantize_checkpoint"]

logger = logging.getLogger("fp4moe")


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str = DEFAULT_FORMAT,
    method: str = "max",
    layers: str | Sequence[str] | None = None,
    calibration: Calibration | None = None,
    max_shard_bytes: float = 5e9,
    progress: bool = True,
    linears: str | Sequence[str] = NONE,
) -> WriteReport:
    """Write a copy of a Hugging Face checkpoint with quantised experts, in ModelOpt's layout.

    All other tensors stay as they are. Biases of experts are written as `.bias` of each projection.
    Python files are not copied. Experts that fp4moe itself cannot run yet (a norm behind each) are
    written for other programs, with a warning. Files go to `<dst>.partial`, which becomes `dst` by
    one rename at the end. If the run is interrupted, call it again: it continues, and gives the
    same bytes.

    Args:
        src: directory with safetensors and config.json; experts in bfloat16, float16 or float32,
            fused or one by one, their columns multiples of 16 (mxfp8 and mxfp4: 32).
        dst: directory that does not exist yet, or is empty.
        format: of the experts, a name of `fp4moe.formats.FORMATS`.
        method: "max", or "mse" with nvfp4, as in `quantize_nvfp4`.
        layers: regular expressions; an experts layer is quantised where one is found in its name,
            such as "model.layers.3.mlp.experts". None takes all but those of multi-token
            prediction: under names of their own (`mtp`), or numbered behind the decoder's layers.
        calibration: experts module -> (hidden_scale, intermediate_scale), decode multipliers
            amax / 2688 (nvfp4) or amax / 448 (fp8); the second is a number or one per expert.
            Names are those of the model or of its files. The files then hold input_scale, and say
            NVFP4, else W4A16_NVFP4; FP8 has one name for both. No other format has such scales.
        max_shard_bytes: bytes of tensors per weight file; a larger tensor has one of its own.
        progress: whether to show a bar over the bytes that are read, and the report.
        linears: "none", or names and patterns (as of fnmatch) of dense Linears, as the files name
            their modules, that are quantised to the same format; q, k and v of one attention, and
            gate and up, share NVFP4's global scale. A pattern passes by output heads and
            routers, whose whole names may be given. Not with `calibration`.

    Raises:
        CheckpointError: `src` is damaged, incomplete, unsafe or quantised; `dst` exists, is a
            partial run of something else, or another process writes it; the disk is full or
            read-only (the partial run stays).
        UnsupportedError: no experts are found, or they are stored in an unknown way; the format,
            the method and the calibration do not go together.
        ShapeError: an argument does not fit.
    """
    return write_checkpoint(
        src,
        dst,
        format=format,
        method=method,
        layers=layers,
        calibration=calibration,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        linears=linears,
        asked=_ask_the_class,
    )


def _ask_the_class(files: CheckpointFiles) -> tuple[list[str], Storages]:
    """Return why from_pretrained will refuse the experts, and how the class stacks them."""
    if importlib.util.find_spec("transformers") is None:
        return [], {}
    try:
        model = model_on_meta(files.directory, caller="quantize_checkpoint")
    except CheckpointError as error:
        # Files for other programs need no class of transformers.
        logger.info("quantize_checkpoint: not known whether from_pretrained will load: %s", error)
        return [], {}
    candidates = find_experts(model)
    refusals = experts_refusals(candidates)
    if refusals:
        logger.warning("quantize_checkpoint: %s: %s", FOR_OTHERS, "; ".join(refusals))
    stored = {c.path: c.storage for c in candidates}
    return refusals, {path: (s.layout, s.transposed) for path, s in stored.items() if s}
