"""A transformers model from its configuration alone: the class that from_pretrained would build.

Built on the meta device, so nothing is allocated. A configuration may hold anything: what the
classes of transformers raise over it is named in one place, `config_errors`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import CheckpointError, must
from .block import ON_META, Candidate

__all__ = ["config_errors", "experts_refusals", "float_twin", "model_class", "model_on_meta"]
__all__ += ["one_line"]


# transformers sets the default dtype of the whole process while it builds.
_one_build_at_a_time = threading.Lock()


def model_class(transformers: Any, config: Any, trusted: bool) -> Any:
    """The class that the configuration names, or what AutoModelForCausalLM finds."""
    own_code = trusted and getattr(config, "auto_map", None)
    for name in () if own_code else config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return transformers.AutoModelForCausalLM


def config_errors() -> tuple[type[Exception], ...]:
    """What transformers raises over a configuration with missing, odd or contradictory entries."""
    from huggingface_hub.errors import StrictDataclassError

    found = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
    return (*found, AssertionError, ImportError, RuntimeError, StrictDataclassError)


def one_line(error: Exception) -> str:
    """The first 300 characters of an error's text, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def model_on_meta(source: str | os.PathLike[str], *, caller: str) -> Any:
    """Build the model of a directory or hub id on the meta device, as if it were not quantised.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    import transformers

    with _one_build_at_a_time:
        return _build(transformers, source, caller)


def _build(transformers: Any, source: str | os.PathLike[str], caller: str) -> Any:
    with _building(caller, source):
        # False: never ask on the terminal whether to run a checkpoint's code.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        _forget_quantization(config)
        kind = model_class(transformers, config, False)
        automatic = kind is transformers.AutoModelForCausalLM
        with torch.device("meta"):
            return kind.from_config(config) if automatic else kind._from_config(config)


def float_twin(model: Any, *, caller: str) -> Any:
    """Build what the class of a model makes of its configuration, float, on the meta device.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    config = copy.deepcopy(model.config)
    _forget_quantization(config)
    with _one_build_at_a_time, _building(caller, type(model).__name__), torch.device("meta"):
        return type(model)._from_config(config)


def _forget_quantization(config: Any) -> None:
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


@contextlib.contextmanager
def _building(caller: str, source: object) -> Iterator[None]:
    """Name what transformers raises while it builds."""
    dtype = torch.get_default_dtype()
    try:
        yield
    except config_errors() as error:
        must(
            f"{caller}: model",
            "have a configuration that transformers can build",
            f"{source}: {one_line(error)}",
            "Check the path, or the entries of config.json.",
            error=CheckpointError,
            cause=error,
        )
    finally:
        # transformers leaves its own where building fails.
        torch.set_default_dtype(dtype)


def experts_refusals(candidates: list[Candidate]) -> list[str]:
    """Why experts of a model on the meta device could not be packed, apart from being there."""
    reasons = [reason for found in candidates for reason in found.reasons]
    return list(dict.fromkeys(reason for reason in reasons if not reason.endswith(ON_META)))
