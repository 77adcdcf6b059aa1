"""Number formats of stored weights, one file each."""

from .base import NVFP4, BlockScaledFormat

__all__ = ["NVFP4", "BlockScaledFormat"]
