"""Number formats of stored weights, one file each."""

from .base import BlockScaledFormat, Part, StoredMatrix, WeightFormat
from .nvfp4 import NVFP4

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "NVFP4",
    "BlockScaledFormat",
    "Part",
    "StoredMatrix",
    "WeightFormat",
]

# What is meant where no format is named.
DEFAULT_FORMAT = NVFP4.name
FORMATS: dict[str, WeightFormat] = {NVFP4.name: NVFP4}
