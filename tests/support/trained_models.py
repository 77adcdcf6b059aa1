"""The script that trained the small models of tests/data, as a module."""

from __future__ import annotations

import importlib.util
import pathlib

TESTS = pathlib.Path(__file__).resolve().parents[1]
SMALL_MODELS = {name: TESTS / "data" / name for name in ("small_gemma4", "small_nemotron_h")}


def training_script():
    """benchmarks/train_small_models.py, which is no module of the package."""
    path = TESTS.parent / "benchmarks" / "train_small_models.py"
    spec = importlib.util.spec_from_file_location("train_small_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
