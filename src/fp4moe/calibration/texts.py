"""A Hugging Face model, its tokenizer and some text: what calibration and evaluation read."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import pickle
from typing import Any, NoReturn

import torch

from ..devices import present_device
from ..errors import CheckpointError, UnsupportedError, must, refuse
from ..models.from_config import config_errors, one_line
from ..progress import transformers_bars

__all__ = ["check_ids", "encode", "load_text_model", "read_text", "read_texts", "text_windows"]


def load_text_model(
    source: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    caller: str,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a directory or a hub id, the model on the GPU if there is one.

    Raises:
        UnsupportedError: transformers is not installed, or the device is not there.
        CheckpointError: there is no such model or tokenizer, or weights are missing.
    """
    if importlib.util.find_spec("transformers") is None:
        what = f"the model {source} cannot be loaded"
        reason = "transformers is not installed"
        refuse(caller, what, reason, "Run pip install 'fp4moe[transformers]'.")
    chosen = present_device(device, caller=caller)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = _tokenizer(AutoTokenizer, source, caller)
    damaged: tuple[type[Exception], ...] = (SafetensorError, pickle.UnpicklingError)
    try:
        # Any: the declared type knows nothing of output_loading_info.
        with transformers_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
    except damaged + config_errors() as error:
        _unloadable(source, error, caller)
    model, info = loaded
    # transformers only warns of weights that it then leaves random.
    if missing := sorted(info["missing_keys"]):
        what = f"the model {source} cannot be used"
        reason = f"it lacks {len(missing)} of its weights: {', '.join(missing[:10])}"
        refuse(caller, what, reason, "Load a complete bfloat16 checkpoint.", error=CheckpointError)
    return model.to(chosen).eval(), tokenizer


def _tokenizer(kind: Any, source: str | os.PathLike, caller: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except Exception as error:
        # The tokenizers library raises Exception itself for a file that it cannot read.
        if type(error) is not Exception and not isinstance(error, config_errors()):
            raise
        _unloadable(source, error, caller)


def _unloadable(source: str | os.PathLike, error: Exception, caller: str) -> NoReturn:
    must(
        f"{caller}: the model",
        "be one with a tokenizer that transformers loads",
        f"{source}: {one_line(error)}",
        "Check the path, or save the tokenizer beside the model.",
        error=CheckpointError,
        cause=error,
    )


def encode(tokenizer: Any, text: str, first: int | None = None) -> torch.Tensor:
    """Return the token ids of a text, int64 [N], without special tokens; only the first so many.

    Tokenising takes long for a text of many megabytes, so only a part of it is read: one that has
    twice the tokens and 64 more, so that its end does not reach the first ones.
    """
    length = len(text) if first is None else 16 * first + 1024
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text) or (first is not None and len(ids) >= 2 * first + 64):
            return torch.tensor(ids[:first], dtype=torch.int64, device="cpu")
        length *= 4


def check_ids(model: Any, ids: torch.Tensor, *, caller: str) -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        CheckpointError: the tokenizer is another model's.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and int(ids.max()) >= known:
        refuse(
            caller,
            "the tokenizer beside the model cannot be used",
            f"it makes the id {int(ids.max())}, and the model has {known} embeddings",
            "Save the model's own tokenizer beside it.",
            error=CheckpointError,
        )


def read_text(path: str | os.PathLike, *, caller: str) -> str:
    """Return a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return pathlib.Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:  # not UTF-8, or no possible path
        rule = "be a readable UTF-8 file"
        got = f"{path}: {error}"
        must(f"{caller}: text", rule, got, "Check the path.", error=CheckpointError, cause=error)


def read_texts(path: str | os.PathLike, *, caller: str) -> list[str]:
    """Return the "text" of every line of a JSON Lines file; blank lines are left out.

    Raises:
        CheckpointError: the file cannot be read, a line is no such object, or there is no text.
    """
    texts = []
    for number, line in enumerate(read_text(path, caller=caller).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            value = error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            must(
                f"{caller}: line {number} of {path}",
                'be a JSON object with a string "text"',
                repr(line[:60]),
                "Write one object a line.",
                error=CheckpointError,
            )
        texts.append(text)
    if not any(texts):
        rule = "hold at least one text"
        must(f"{caller}: {path}", rule, "none", "Write one object a line.", error=CheckpointError)
    return texts


def text_windows(ids: torch.Tensor, length: int, tokens: int, first: int | None) -> torch.Tensor:
    """Return windows that do not overlap, spread evenly over a text.

    Args:
        ids: int64 [N].
        length: tokens of a window.
        tokens: how many to take in all, rounded up to whole windows; all that there are if fewer.
        first: id that stands in front of every window (a model's beginning of text), or None.

    Returns:
        [W, length], or [W, 1 + length] with `first`.

    Raises:
        UnsupportedError: the text is shorter than one window.
    """
    available = len(ids) // length
    if not available:
        rule = f"have at least {length} tokens"
        advice = "Pass a longer text, or a smaller length."
        must("evaluate: text", rule, len(ids), advice, error=UnsupportedError)
    count = min(available, -(-tokens // length))
    chosen = torch.arange(count, dtype=torch.int64, device="cpu") * available // count
    windows = ids[: available * length].view(available, length)[chosen]
    if first is None:
        return windows
    return torch.cat((torch.full((count, 1), first, dtype=torch.int64, device="cpu"), windows), 1)
