"""evaluate: what NVFP4 experts cost a model, on text.

The same tokens go through the bfloat16 model, through fused experts with its weights (W4A16) and
with quantised activations (W4A4, emulated by the kernel reference_w4a4, hence on any device).
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration.calibrate import calibrate_on_texts
from ..calibration.texts import (
    check_ids,
    encode,
    load_text_model,
    read_text,
    read_texts,
    text_windows,
)
from ..errors import must
from ..models.replace import replace_moe
from ..module import FusedExperts
from ..progress import progress_bar
from ..report import format_table
from .sample_text import standard_library_text

__all__ = ["EvaluationReport", "EvaluationRow", "evaluate"]


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One way to run the experts. Losses are in nats a token; errors are standard errors.

    Attributes:
        name: "bf16", "W4A16", "W4A4" or "W4A4 calibrated".
        loss, loss_error: mean of -ln p(token), and its standard error over the windows.
        difference, difference_error: mean of the loss minus that of bf16, paired token by token; 0
            for bf16 itself.
        agreement: share of the positions where the most likely token is that of bf16.
    """

    name: str
    loss: float
    loss_error: float
    difference: float
    difference_error: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits(self) -> float:
        """Bits a token; of a byte-level model, bits a byte."""
        return self.loss / math.log(2)


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The rows of `evaluate`; `str()` is a table, `to_dict()` plain data.

    Attributes:
        model, text, method: what was asked for.
        tokens, windows: how many were predicted, in how many windows.
        rows: bf16 first.
    """

    model: str
    text: str
    method: str
    tokens: int
    windows: int
    rows: tuple[EvaluationRow, ...]

    def row(self, name: str) -> EvaluationRow:
        """Return the row of that name."""
        return {row.name: row for row in self.rows}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ["experts", "perplexity", "bits/token", "more than bf16", "top-1 as bf16"]
        table = []
        for row in self.rows:
            error = row.perplexity * row.loss_error
            cells = [row.name, f"{row.perplexity:.4g} +- {error:.2g}", f"{row.bits:.4f}"]
            if row.name == "bf16":
                cells += ["", ""]
            else:
                more, error = (v / math.log(2) for v in (row.difference, row.difference_error))
                cells += [f"{more:+.4f} +- {error:.4f}", f"{100 * row.agreement:.2f} %"]
            table.append(cells)
        return (
            f"{format_table(header, table)}\n{self.model}, experts quantised with "
            f"method={self.method}: {self.tokens} tokens in {self.windows} windows of {self.text}"
        )


def evaluate(
    model: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    tokens: int = 16384,
    length: int = 512,
    calibrate: str | os.PathLike | None = None,
    percentile: float | None = None,
    method: str = "max",
    batch: int = 4,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Compare a bfloat16 model with its NVFP4 experts on the same tokens.

    Args:
        model: a Hugging Face directory or hub id, with its tokenizer.
        text: a UTF-8 file; default the held-out part of Python's standard library.
        tokens: how many to predict, in windows spread evenly over the text.
        length: tokens of a window. Behind the model's beginning-of-text token, if it has one; else
            a window's first token is not predicted.
        calibrate: a JSON Lines file with a "text" on each line; adds the row "W4A4 calibrated".
        percentile: of that calibration, see `fp4moe.calibrate`.
        method: "max" or "mse", see `fp4moe.quantize_nvfp4`.
        batch: windows at a time.
        device: default the GPU, if there is one.
        progress: show progress bars on stderr.

    Raises:
        ShapeError: tokens, length or batch is too small.
        CheckpointError: a model, tokenizer or text cannot be read.
        UnsupportedError: `replace_moe` cannot replace the model's experts, or the text is too
            short.
    """
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2), ("batch", batch, 1)):
        if value < least:
            must(f"evaluate: {name}", f"be at least {least}", value, "Pass a larger number.")
    if text is None:
        content = b"\n".join(standard_library_text()).decode("utf-8", "replace")
    else:
        content = read_text(text, caller="evaluate")
    calibration = [] if calibrate is None else read_texts(calibrate, caller="evaluate")
    loaded, tokenizer = load_text_model(model, device=device, caller="evaluate")
    windows = text_windows(encode(tokenizer, content), length, tokens, tokenizer.bos_token_id)
    check_ids(loaded, windows, caller="evaluate")

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return _predict(loaded, windows, batch, name, progress)

    measured = {"bf16": run("bf16")}
    if calibration:
        options: dict[str, Any] = {"percentile": percentile, "length": length, "progress": progress}
        calibrate_on_texts(loaded, tokenizer, calibration, **options)
    replace_moe(loaded, "reference", progress=progress, method=method)
    measured["W4A16"] = run("W4A16")
    scales = _quantize_activations(loaded)
    for module in scales:
        module.set_activation_scales(1.0, 1.0)
    measured["W4A4"] = run("W4A4")
    if calibration:
        for module, (hidden_scale, intermediate_scale) in scales.items():
            module.set_activation_scales(hidden_scale, intermediate_scale)
        measured["W4A4 calibrated"] = run("W4A4 calibrated")
    rows = tuple(_row(name, *found, *measured["bf16"]) for name, found in measured.items())
    source = "Python's standard library" if text is None else os.fspath(text)
    predicted = measured["bf16"][0].numel()
    return EvaluationReport(os.fspath(model), source, method, predicted, len(windows), rows)


def _predict(
    model: Any, windows: torch.Tensor, batch: int, name: str, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -ln p of each next token and the most likely ones, [W, length - 1] on the CPU."""
    losses, best = [], []
    bar = progress_bar(show=progress, total=len(windows), desc=name, unit="window")
    with torch.no_grad(), bar:
        for ids in windows.split(min(batch, len(windows))):
            ids = ids.to(model.device)
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            wanted = ids[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
            losses.append(loss.view(len(ids), -1).double().cpu())
            best.append(logits.argmax(-1).cpu())
            bar.update(len(ids))
    return torch.cat(losses), torch.cat(best)


def _quantize_activations(model: nn.Module) -> dict[FusedExperts, tuple[torch.Tensor, ...]]:
    """Give every block the kernel reference_w4a4; returns the blocks with their scales."""
    found = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, FusedExperts):
            parent, _, name = path.rpartition(".")
            emulated = FusedExperts(module.weights, "reference_w4a4", top_k=module.top_k)
            setattr(model.get_submodule(parent), name, emulated)
            found[emulated] = tuple(scale.clone() for scale in emulated.activation_scales())
    return found


def _row(
    name: str,
    loss: torch.Tensor,
    best: torch.Tensor,
    base_loss: torch.Tensor,
    base_best: torch.Tensor,
) -> EvaluationRow:
    return EvaluationRow(
        name,
        *_mean_and_error(loss),
        *_mean_and_error(loss - base_loss),
        agreement=float((best == base_best).double().mean()),
    )


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of [W, N] and its standard error; the tokens of a window are not independent."""
    means = values.mean(1)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return float(means.mean()), error
