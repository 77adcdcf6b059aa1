"""Number formats of stored weights, one file each."""

from .base import BlockScaledFormat, Part, StoredMatrix, WeightFormat
from .nvfp4 import NVFP4

__all__ = ["FORMATS", "NVFP4", "BlockScaledFormat", "Part", "StoredMatrix", "WeightFormat"]

FORMATS: dict[str, WeightFormat] = {NVFP4.name: NVFP4}
