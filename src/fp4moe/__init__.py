"""NVFP4 mixture-of-experts operators for PyTorch, and the passes that put them into a model's graph."""

from . import errors
from .activations import ACTIVATIONS
from .experts import ExpertWeights
from .formats import NVFP4
from .kernels import why_not
from .ops import fused_moe
from .quantize import NVFP4Values, dequantize_nvfp4, quantize_nvfp4
from .version import __version__

__all__ = [
    "ACTIVATIONS",
    "NVFP4",
    "ExpertWeights",
    "NVFP4Values",
    "__version__",
    "dequantize_nvfp4",
    "errors",
    "fused_moe",
    "quantize_nvfp4",
    "why_not",
]
