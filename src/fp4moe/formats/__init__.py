"""Number formats of stored weights, one file a family."""

from .base import BlockScaledFormat, Part, StoredMatrix, WeightFormat
from .fp8 import FP8, FP8_BLOCK, FP8_CHANNEL
from .mx import MXFP4, MXFP8
from .nvfp4 import NVFP4

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "FP8",
    "FP8_BLOCK",
    "FP8_CHANNEL",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "BlockScaledFormat",
    "Part",
    "StoredMatrix",
    "WeightFormat",
]

# What is meant where no format is named.
DEFAULT_FORMAT = NVFP4.name
FORMATS: dict[str, WeightFormat] = {
    format.name: format for format in (NVFP4, FP8, FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4)
}
