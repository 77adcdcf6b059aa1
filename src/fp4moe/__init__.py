"""NVFP4 mixture-of-experts operators for PyTorch, and the passes that put them into a graph."""

from . import errors
from .activations import ACTIVATIONS
from .autotune import autotune
from .calibrate import calibrate
from .checkpoint.load import from_pretrained, register_transformers
from .checkpoint.writer import quantize_checkpoint
from .evaluate import evaluate
from .experts import ExpertWeights
from .explain import ModelReport
from .formats import NVFP4
from .integrations.experts_implementation import register_when_imported
from .kernels import why_not
from .kernels.flashinfer_library import set_flashinfer
from .linear import FP8Linear, NVFP4Linear
from .module import FusedExperts
from .ops import fused_moe
from .quantize import NVFP4Values, dequantize_nvfp4, quantize_nvfp4
from .replace import explain, replace_moe
from .selftest import selftest
from .version import __version__

# Last: the passes import the package.
from . import passes  # isort: skip
from . import tensorrt  # isort: skip
from .compile import backend, inductor_options  # isort: skip

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

register_when_imported()
