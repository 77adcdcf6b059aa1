"""NVFP4 mixture-of-experts operators for PyTorch, and the passes that put them into a graph.

Importing this registers the operators (`torch.ops.fp4moe`) and loads little more than that: tools,
passes and whatever else `import torch` does not load by itself come with the first use of a name.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

from . import errors
from .activations import ACTIVATIONS
from .experts import ExpertWeights
from .formats import NVFP4
from .integrations.experts_implementation import register_when_imported
from .kernels import why_not
from .kernels.flashinfer_library import set_flashinfer
from .linear import FP8Linear, NVFP4Linear
from .module import FusedExperts
from .ops import fused_moe
from .quantize import NVFP4Values, dequantize_nvfp4, quantize_nvfp4
from .version import __version__

if TYPE_CHECKING:
    from . import passes, tensorrt
    from .autotune import autotune
    from .calibrate import calibrate
    from .checkpoint.load import from_pretrained, register_transformers
    from .checkpoint.writer import quantize_checkpoint
    from .compile import backend, inductor_options
    from .evaluate import evaluate
    from .explain import ModelReport
    from .replace import explain, replace_moe
    from .selftest import selftest

__all__ = [
    "ACTIVATIONS",
    "NVFP4",
    "ExpertWeights",
    "FP8Linear",
    "FusedExperts",
    "ModelReport",
    "NVFP4Linear",
    "NVFP4Values",
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
    "register_transformers",
    "replace_moe",
    "selftest",
    "set_flashinfer",
    "tensorrt",
    "why_not",
]

# Names that come at their first use, and the modules that have them.
_LATE = {
    "ModelReport": "explain",
    "autotune": "autotune",
    "backend": "compile",
    "calibrate": "calibrate",
    "evaluate": "evaluate",
    "explain": "replace",
    "from_pretrained": "checkpoint.load",
    "inductor_options": "compile",
    "quantize_checkpoint": "checkpoint.writer",
    "register_transformers": "checkpoint.load",
    "replace_moe": "replace",
    "selftest": "selftest",
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


class _Package(types.ModuleType):
    """Keeps the functions that share a name with their module, such as `calibrate`.

    The import system binds a module to its name in the package, whoever imports it, at any time.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LATE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register_when_imported()
