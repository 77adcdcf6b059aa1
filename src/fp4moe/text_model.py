"""A Hugging Face model, its tokenizer and some text: what calibration and evaluation read."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
from typing import Any

import torch

from .errors import CheckpointError, UnsupportedError

__all__ = ["encode", "load_text_model", "read_text", "read_texts", "text_windows"]


def load_text_model(
    source: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a directory or a hub id, the model on the GPU if there is one.

    Raises:
        UnsupportedError: transformers is not installed.
        CheckpointError: there is no such model or tokenizer, or weights are missing.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedError(
            "load_text_model: transformers must be installed; got none. Run pip install "
            "'fp4moe[transformers]'."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Any: the declared type knows nothing of output_loading_info.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"load_text_model: source must be a model with a tokenizer that transformers loads; "
            f"got {source}: {error}. Check the path, or save the tokenizer beside the model."
        ) from error
    model, info = loaded
    # transformers only warns of weights that it then leaves random.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"load_text_model: source must hold all weights; got {source} without "
            f"{', '.join(missing[:10])} ({len(missing)} in all). Load a complete bfloat16 "
            "checkpoint."
        )
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(chosen).eval(), tokenizer


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the token ids of a text, int64 [N], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def read_text(path: str | os.PathLike) -> str:
    """Return a UTF-8 file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"read_text: path must be a readable UTF-8 file; got {path}: {error}. Check the path."
        ) from error


def read_texts(path: str | os.PathLike) -> list[str]:
    """Return the "text" of every line of a JSON Lines file; blank lines are left out.

    Raises:
        CheckpointError: the file cannot be read, a line is no such object, or there is no text.
    """
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            value = error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise CheckpointError(
                f"read_texts: line {number} of {path} must be a JSON object with a string "
                f'"text"; got {line[:60]!r}. Write one object a line.'
            )
        texts.append(text)
    if not any(texts):
        raise CheckpointError(
            f"read_texts: {path} must hold at least one text; got none. Write one object a line."
        )
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
        raise UnsupportedError(
            f"text_windows: text must have at least {length} tokens; got {len(ids)}. Pass a longer "
            "text, or a smaller length."
        )
    count = min(available, -(-tokens // length))
    chosen = torch.arange(count) * available // count
    windows = ids[: available * length].view(available, length)[chosen]
    if first is None:
        return windows
    return torch.cat((torch.full((count, 1), first), windows), 1)
