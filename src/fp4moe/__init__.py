"""NVFP4 mixture-of-experts operators for PyTorch, and the passes that put them into a graph.

Importing this registers the operators (`torch.ops.fp4moe`), changes nothing else, and loads little
more than that: tools, passes and whatever else `import torch` does not load by itself come with the
first use of a name.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import errors
from . import grouped_mm as grouped_mm  # its operators
from .activations import ACTIVATIONS, Activation
from .experts import ExpertWeights
from .formats import NVFP4
from .formats.nvfp4 import NVFP4Values, dequantize_nvfp4, quantize_nvfp4
from .fused import fused_moe
from .kernels import why_not
from .kernels.flashinfer.library import set_flashinfer
from .linear import FP8Linear, NVFP4Linear, PackedLinear
from .module import FusedExperts
from .version import __version__

if TYPE_CHECKING:
    from . import passes, tensorrt
    from .calibration.calibrate import calibrate
    from .compile.backend import backend, inductor_options
    from .models.autotune import autotune
    from .models.register_peft import register_peft
    from .models.replace import explain, replace_moe
    from .models.split_experts import split_experts
    from .pretrained.load import from_pretrained, register_transformers
    from .pretrained.quantize import quantize_checkpoint
    from .report import ModelReport
    from .tools.evaluate import evaluate
    from .tools.selftest import selftest

__all__ = [
    "ACTIVATIONS",
    "NVFP4",
    "Activation",
    "ExpertWeights",
    "FP8Linear",
    "FusedExperts",
    "ModelReport",
    "NVFP4Linear",
    "NVFP4Values",
    "PackedLinear",
    "__version__",
    "autotune",
    "backend",
    "calibrate",
    "dequantize_nvfp4",
    "errors",
    "evaluate",
    "explain",
    "from_pretrained",
    "fused_moe",
    "inductor_options",
    "passes",
    "quantize_checkpoint",
    "quantize_nvfp4",
    "register_peft",
    "register_transformers",
    "replace_moe",
    "selftest",
    "set_flashinfer",
    "split_experts",
    "tensorrt",
    "why_not",
]

# Names that come at their first use, and the modules that have them.
_LATE = {
    "ModelReport": "report",
    "autotune": "models.autotune",
    "backend": "compile.backend",
    "calibrate": "calibration.calibrate",
    "evaluate": "tools.evaluate",
    "explain": "models.replace",
    "from_pretrained": "pretrained.load",
    "inductor_options": "compile.backend",
    "quantize_checkpoint": "pretrained.quantize",
    "register_peft": "models.register_peft",
    "register_transformers": "pretrained.load",
    "replace_moe": "models.replace",
    "selftest": "tools.selftest",
    "split_experts": "models.split_experts",
}

if not TYPE_CHECKING:  # A type checker would take any name for one of these.

    def __getattr__(name: str) -> Any:
        """Import what a name stands for: one of _LATE, or a submodule."""
        if name in _LATE:
            value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
            globals()[name] = value
            return value
        full = f"{__name__}.{name}"
        if name.startswith("_") or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(full)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
