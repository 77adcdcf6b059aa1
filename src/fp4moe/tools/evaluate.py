"""evaluate: what quantised experts cost a model, on text, by number format.

The same tokens go through the bfloat16 model, through fused experts with its weights (W4A16, W8A16)
and with rounded activations (W4A4, W8A8, W4A8, emulated by the kernel reference_w4a4, hence on any
device).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
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
from ..errors import check_choice, must
from ..formats import DEFAULT_FORMAT, FORMATS, WeightFormat
from ..models.block import ACTIVATION_SCALES
from ..models.replace import replace_moe
from ..module import FusedExperts
from ..progress import progress_bar
from ..report import format_table
from .sample_text import standard_library_text

__all__ = ["EvaluationReport", "EvaluationRow", "evaluate"]

# Of each window: losses and most likely tokens.
Predicted = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One way to run the experts. Losses are in nats a token; errors are standard errors.

    Attributes:
        name: "bf16", or bits of weights and activations: "W4A16", "W4A4", "W4A4 calibrated".
        format: of the weights; None for bf16.
        loss, loss_error: mean of -ln p(token), and its standard error over the windows.
        difference, difference_error: mean of the loss minus that of bf16, paired token by token; 0
            for bf16 itself.
        agreement: share of the positions where the most likely token is that of bf16.
    """

    name: str
    format: str | None
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
        rows: bf16 first, then each format's.
    """

    model: str
    text: str
    method: str
    tokens: int
    windows: int
    rows: tuple[EvaluationRow, ...]

    def row(self, name: str, format: str | None = None) -> EvaluationRow:
        """Return the row of that name; format: which of several with this name."""
        found = [r for r in self.rows if r.name == name and format in (None, r.format)]
        if not found:
            known = ", ".join(f"{row.name} ({row.format})" for row in self.rows)
            must("EvaluationReport.row: name", f"be one of {known}", repr(name), "Pass one.")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = [
            "experts",
            "format",
            "perplexity",
            "bits/token",
            "more than bf16",
            "top-1 as bf16",
        ]
        table = []
        for row in self.rows:
            error = row.perplexity * row.loss_error
            cells = [row.name, row.format or "-"]
            cells += [f"{row.perplexity:.4g} +- {error:.2g}", f"{row.bits:.4f}"]
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
    format: str | Sequence[str] = DEFAULT_FORMAT,
    text: str | os.PathLike | None = None,
    tokens: int = 16384,
    length: int = 512,
    calibrate: str | os.PathLike | None = None,
    percentile: float | None = None,
    method: str = "max",
    batch: int = 4,
    device: str | torch.device | None = None,
    progress: bool = True,
    linears: str | Sequence[str] = "none",
) -> EvaluationReport:
    """Compare a bfloat16 model with its quantised experts, and Linears, on the same tokens.

    Args:
        model: a Hugging Face directory or hub id, with its tokenizer.
        format: a name of `fp4moe.formats.FORMATS`, or several; the model is loaded for each.
        text: a UTF-8 file; default the held-out part of Python's standard library.
        tokens: how many to predict, in windows spread evenly over the text.
        length: tokens of a window. Behind the model's beginning-of-text token, if it has one; else
            a window's first token is not predicted.
        calibrate: a JSON Lines file with a "text" on each line; adds rows such as "W4A4
            calibrated" for formats whose activations have scales that are stored.
        percentile: of that calibration, see `fp4moe.calibrate`.
        method: "max" or "mse", see `fp4moe.quantize_nvfp4`.
        batch: windows at a time.
        device: default the GPU, if there is one.
        progress: show progress bars on stderr.
        linears: dense Linears to quantise beside the experts, see `fp4moe.replace_moe`; their
            inputs are not rounded in any row.

    Raises:
        ShapeError: tokens, length or batch is too small, or there is no format.
        CheckpointError: a model, tokenizer or text cannot be read.
        UnsupportedError: `replace_moe` cannot replace the model's experts, there is no such format
            or method, or the text is too short.
    """
    formats = (format,) if isinstance(format, str) else tuple(dict.fromkeys(format))
    if not formats:
        must("evaluate: format", "name a format", "none", f"Known are {', '.join(FORMATS)}.")
    for one in formats:
        check_choice("format", one, FORMATS, caller="evaluate")
        FORMATS[one].check_method(method, caller="evaluate")
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

    def predict(title: str, model: Any) -> Predicted:
        return _predict(model, windows, batch, title, progress)

    measured: dict[tuple[str, str | None], Predicted] = {("bf16", None): predict("bf16", loaded)}
    if calibration:
        recorded: dict[str, Any] = {"percentile": percentile, "length": length}
        calibrate_on_texts(loaded, tokenizer, calibration, progress=progress, **recorded)
    ranges = {
        path: getattr(module, ACTIVATION_SCALES)
        for path, module in loaded.named_modules()
        if hasattr(module, ACTIVATION_SCALES)
    }
    for name in formats:
        if name != formats[0]:
            # Two models would not fit where one does.
            del loaded
            loaded, _ = load_text_model(model, device=device, caller="evaluate")
            for path, scales in ranges.items():
                setattr(loaded.get_submodule(path), ACTIVATION_SCALES, scales)
        options: dict[str, Any] = {"format": name, "method": method, "linears": linears}
        replace_moe(loaded, "reference", progress=progress, **options)
        found = _measure(loaded, FORMATS[name], predict, bool(calibration))
        measured |= {(row, name): predicted for row, predicted in found.items()}
    base = measured["bf16", None]
    rows = tuple(_row(*names, *found, *base) for names, found in measured.items())
    source = "Python's standard library" if text is None else os.fspath(text)
    count = base[0].numel()
    return EvaluationReport(os.fspath(model), source, method, count, len(windows), rows)


def _measure(
    model: Any, format: WeightFormat, predict: Callable[[str, Any], Predicted], calibrated: bool
) -> dict[str, Predicted]:
    """Run a replaced model with 16-bit activations, then with rounded ones."""
    rounded = f"W{format.weight_bits}A{format.activation_bits}"
    plain = f"W{format.weight_bits}A16"
    found = {plain: predict(f"{format.name} {plain}", model)}
    blocks = _quantize_activations(model)
    for module in blocks:
        module.set_activation_scales(1.0, 1.0)
    found[rounded] = predict(f"{format.name} {rounded}", model)
    if calibrated and format.activation_range is not None:
        for module, (hidden_scale, intermediate_scale) in blocks.items():
            module.set_activation_scales(hidden_scale, intermediate_scale)
        name = f"{rounded} calibrated"
        found[name] = predict(f"{format.name} {name}", model)
    return found


def _predict(model: Any, windows: torch.Tensor, batch: int, name: str, progress: bool) -> Predicted:
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
    format: str | None,
    loss: torch.Tensor,
    best: torch.Tensor,
    base_loss: torch.Tensor,
    base_best: torch.Tensor,
) -> EvaluationRow:
    return EvaluationRow(
        name,
        format,
        *_mean_and_error(loss),
        *_mean_and_error(loss - base_loss),
        agreement=float((best == base_best).double().mean()),
    )


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of [W, N] and its standard error; the tokens of a window are not independent."""
    means = values.mean(1)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return float(means.mean()), error
