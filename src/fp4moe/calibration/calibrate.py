"""calibrate: record the ranges of activations, which become the global scales of the W4A4 path.

Float experts and fused ones alike; what looks at them is in recorders.py. `fp4moe.backend`, which
packs weights of its own, does not know these scales.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from ..borrowed import Borrowed
from ..errors import must, refuse
from ..formats import DEFAULT_FORMAT
from ..progress import progress_bar
from ..report import format_table
from .recorders import BlockRanges, activation_range, make_recorders
from .texts import check_ids, encode, load_text_model, read_texts

__all__ = [
    "BlockRanges",
    "CalibrationReport",
    "calibrate",
    "calibrate_on_texts",
    "scales_from_text",
]

logger = logging.getLogger("fp4moe")


@dataclasses.dataclass
class CalibrationReport:
    """The ranges of all blocks, filled when the context ends; `str()` is a table.

    Attributes:
        blocks: one entry for each block that saw a token.
        uncalibrated: paths of those that saw none; they are as they were.
    """

    blocks: tuple[BlockRanges, ...] = ()
    uncalibrated: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ["block", "tokens", "experts without", "hidden range", "intermediate ranges"]
        rows = []
        for block in self.blocks:
            unseen = f"{block.tokens.count(0)} of {len(block.tokens)}"
            ends = min(block.intermediate_ranges), max(block.intermediate_ranges)
            between = f"{ends[0]:.4g} to {ends[1]:.4g}"
            cells = [block.path, str(sum(block.tokens)), unseen, f"{block.hidden_range:.4g}"]
            rows.append([*cells, between])
        lines = [format_table(header, rows)]
        lines += [f"{path}: no token, not calibrated" for path in self.uncalibrated]
        return "\n".join(lines)


def _force_eager() -> Callable[[], object]:
    stance = torch.compiler.set_stance("force_eager")  # from here on
    return lambda: stance.__exit__(None, None, None)


_eager = Borrowed(_force_eager, lambda leave: leave())


@contextlib.contextmanager
def calibrate(model: nn.Module, *, percentile: float | None = None) -> Iterator[CalibrationReport]:
    """Record the ranges of the experts' activations while the model runs inside the context.

        with fp4moe.calibrate(model) as report:
            for batch in batches:
                model(**batch)
        print(report)

    At the end each block gets a `hidden_scale` and an `intermediate_scale`: its range divided by
    what a scale of 1 expresses (6 * 448 in NVFP4, 448 in FP8). This is how ModelOpt defines
    `input_scale`. Fused experts keep the scales in their state_dict. Float experts keep them until
    `replace_moe` (or `experts_implementation="fp4moe"`) packs them, in any format. Only kernels
    that round activations use them. A second calibration replaces the first. The model runs as it
    is, so a layer behind rounded activations sees their rounding. Inside the context, fused experts
    of a kernel with its own layout are also held in checkpoint order: twice their memory.

    Inside the context torch.compile is off (`torch.compiler.set_stance("force_eager")`, for the
    whole process): a compiled graph would not show its activations.

    Args:
        model: a model with fused experts, float ones that `replace_moe` would take, or both.
        percentile: None for the largest magnitude seen. Else, above 0 and up to 100, the percentile
            of the magnitudes that are not zero (99.99, say), see `ranges.py`: what lies above is
            clipped, and small values keep more of their bits.

    Yields:
        A report that is empty until the context ends. An expert that saw no token gets the largest
        range of the block's other experts.

    Raises:
        ShapeError: percentile is out of range; an activation is inf or NaN; all are zero.
        UnsupportedError: the model holds no experts that can be calibrated, or none saw a token.
            After any exception, also one of the caller's, the model is as it was.
    """
    if percentile is not None and not 0 < percentile <= 100:
        advice = "Pass 99.99, or None for the largest magnitude."
        must("calibrate: percentile", "be above 0 and at most 100", percentile, advice)
    recorders = make_recorders(model, percentile)
    report = CalibrationReport()
    handles: list[RemovableHandle] = []
    try:
        for recorder in recorders:
            handles += recorder.attach()
        with _eager.borrow():
            yield report
    finally:
        for handle in handles:
            handle.remove()
    seen = [recorder for recorder in recorders if any(recorder.tokens)]
    if not seen:
        refuse(
            "calibrate",
            "no range can be recorded",
            f"no token reached any of the {len(recorders)} blocks of experts inside the context",
            "Call this very model there, not an exported or captured one.",
        )
    blocks = tuple(recorder.result() for recorder in seen)
    for recorder, block in zip(seen, blocks, strict=True):
        recorder.store(block)
        if 0 in block.tokens:
            logger.warning(
                "calibrate: %s: %d of %d experts saw no token and get the largest range of the "
                "others; run more text",
                *(block.path, block.tokens.count(0), len(block.tokens)),
            )
    report.blocks = blocks
    report.uncalibrated = tuple(r.path for r in recorders if r not in seen)
    for path in report.uncalibrated:
        logger.warning("calibrate: %s saw no token and is not calibrated", path)


def calibrate_on_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    percentile: float | None,
    length: int,
    progress: bool,
) -> CalibrationReport:
    """Run `calibrate` on the first `length` tokens of each text, one text at a time."""
    with calibrate(model, percentile=percentile) as report, torch.no_grad():
        for text in progress_bar(texts, show=progress, desc="calibrating", unit="text"):
            ids = encode(tokenizer, text, length)
            check_ids(model, ids, caller="calibrate")
            if len(ids):
                model(ids.unsqueeze(0).to(model.device), use_cache=False)
    return report


def scales_from_text(
    directory: str | os.PathLike,
    text: str | os.PathLike,
    *,
    format: str = DEFAULT_FORMAT,
    percentile: float | None = None,
    length: int = 512,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, tuple[float, list[float]]]:
    """Run a bfloat16 Hugging Face model on a text and return the scales of its experts.

    Args:
        directory: what `AutoModelForCausalLM.from_pretrained` takes, with its tokenizer.
        text: a JSON Lines file; each line is an object whose "text" is a string.
        format: of the experts that the scales are for.
        percentile: see `calibrate`.
        length: tokens of each text that are read, from its start.
        device: default the GPU, if there is one.
        progress: show a progress bar on stderr.

    Returns:
        By the dotted name of each experts module: (hidden_scale, intermediate_scale of each
        expert), decode multipliers of that format.

    Raises:
        CheckpointError: the directory or the text cannot be read; names the line.
        UnsupportedError, ShapeError: see `calibrate`.
    """
    activation_range(format, caller="quantize")
    texts = read_texts(text, caller="quantize")
    model, tokenizer = load_text_model(directory, device=device, caller="quantize")
    options: dict[str, Any] = {"percentile": percentile, "length": length, "progress": progress}
    report = calibrate_on_texts(model, tokenizer, texts, **options)
    if progress:
        tqdm.write(str(report), file=sys.stderr)
    scales = {block.path: block.scales(format) for block in report.blocks}
    return {path: (hidden, list(inner)) for path, (hidden, inner) in scales.items()}
