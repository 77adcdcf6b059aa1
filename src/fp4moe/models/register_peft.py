"""register_peft: PEFT's LoRA on packed modules."""

from __future__ import annotations

import importlib.metadata

from ..errors import refuse

__all__ = ["register_peft"]

OLDEST = (0, 21)


def register_peft() -> None:
    """Let PEFT adapt packed experts and Linears; safe to repeat.

    From then on `LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])` means
    the same for packed experts as for the float ones that they came from, and `target_modules`
    takes `PackedLinear`. Files are PEFT's own: an adapter that was trained here loads on the float
    model, and the other way round. Weights stay packed, so adapters stay beside them: merging is
    refused. `get_peft_model`, `PeftModel.from_pretrained` and transformers' `add_adapter` follow.

    Raises:
        UnsupportedError: PEFT 0.21 or newer is not installed, or another package has put its own
            LoRA there.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.lora import LoraModel
        from peft.utils import PeftType
    except ImportError as error:
        what, advice = "adapters cannot be registered", "Install peft."
        refuse("register_peft", what, f"of {error}", advice, cause=error)
    version = importlib.metadata.version("peft")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        what, reason = "adapters cannot be registered", f"PEFT {version} wraps parameters otherwise"
        refuse("register_peft", what, reason, "Install peft 0.21 or newer.")
    from .peft_lora import PackedLoraModel

    present = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    if present not in (LoraModel, PackedLoraModel):
        reason = f"LORA is {present.__module__}.{present.__qualname__} already"
        refuse("register_peft", "PEFT's LoRA cannot be extended", reason, "Register this first.")
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = PackedLoraModel
