"""The version of fp4moe, readable without torch."""

__version__ = "0.1.0"
