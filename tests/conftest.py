"""What every test gets: a fixed seed, and the fixtures and markers that tests ask for by name."""

from __future__ import annotations

import gc
import hashlib
import importlib
import itertools
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator

import pytest
import torch


def _inductor_cache() -> str:
    """A folder of these sources: a compiled graph names operators of the version that made it."""
    root, digest = pathlib.Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in (root / "src", root / "passes"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return os.path.join(tempfile.gettempdir(), f"fp4moe_inductor_{digest.hexdigest()[:16]}")


os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor_cache())
# Each new cache would have the compiler prove AVX2 and AVX512 again: nine seconds of a core.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of collections, and collect less often: 5 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Start every test from the same random state, and end it with the default dtype as it was."""
    torch.manual_seed(0)
    yield
    left, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float32)
    assert left is torch.float32


@pytest.fixture(autouse=True)
def nothing_checked() -> None:
    """Forget which calls passed: the device of another test may have been a pretended one."""
    if "fp4moe.ops" in sys.modules:
        sys.modules["fp4moe.ops"]._checked.clear()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compile from nothing, and leave nothing compiled behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which structures other tests have verified."""
    monkeypatch.setattr(importlib.import_module("fp4moe.passes.plan"), "_verdicts", {})


@pytest.fixture
def float32_settings() -> Iterator[None]:
    """Start from torch's own settings of float32 products, and put back what was there."""
    # torch.export sets the inner ones to the outermost one and leaves them so.
    inner = itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn"))
    settings = [("generic", "all"), *inner]
    before = [torch._C._get_fp32_precision_getter(*setting) for setting in settings]
    legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for backend in ("cuda", "mkldnn"):
        torch._C._set_fp32_precision_setter(backend, "matmul", "none")
    yield
    torch.set_float32_matmul_precision(legacy)
    for setting, value in zip(settings, before, strict=True):
        torch._C._set_fp32_precision_setter(*setting, value)


@pytest.fixture(params=["legacy", "of matmul", "of everything"])
def float32_products(request: pytest.FixtureRequest, float32_settings: None) -> None:
    """Let float32 products be TF32, in each way that torch has."""
    if request.param == "legacy":
        torch.set_float32_matmul_precision("high")
    elif request.param == "of matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns after 10 us."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill torch.empty and its kin with NaN (integers: their maximum).

    An output element that nobody wrote then fails the comparison. Torch fills memory only in its
    deterministic mode; operators without a deterministic form warn there, which is not an error.
    """
    deterministic = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            deterministic.fill_uninitialized_memory = fill
            torch.set_deterministic_debug_mode(mode)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp4moe.register_transformers(), undone afterwards."""
    from transformers import PreTrainedConfig
    from transformers.integrations.moe import ExpertsInterface
    from transformers.quantizers import auto

    import fp4moe

    implementations = dict(ExpertsInterface._global_mapping)
    monkeypatch.setattr(ExpertsInterface, "_global_mapping", implementations)

    plain = PreTrainedConfig.__dict__["get_config_dict"]
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", plain)
    for name in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    fp4moe.register_transformers()
    fp4moe.register_transformers()


@pytest.fixture
def registered_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp4moe.register_peft(), undone afterwards."""
    peft = pytest.importorskip("peft", reason="optional package")
    import fp4moe

    tuners, kind = peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA
    monkeypatch.setitem(tuners, kind, tuners[kind])
    fp4moe.register_peft()
