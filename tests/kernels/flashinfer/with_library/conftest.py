"""A Blackwell GPU for tests on a CPU: its capability is claimed, and its functions are emulated.

FlashInfer itself is the installed one: its signatures, enums and features are real. Every call is
checked against its signature and the contract before the emulator computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fp4moe.kernels import base
from fp4moe.kernels.flashinfer import library as flashinfer_library


@dataclasses.dataclass
class Recorder:
    """The calls that were made, by function name, in order."""

    calls: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    activation: str | None = None
    parameters: dict[str, float] | None = None
    tune_max_num_tokens: int | None = None

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def claim(monkeypatch) -> Callable[[tuple[int, int] | None], None]:
    """Return a function that makes every device claim a compute capability."""

    def set_capability(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(base, "query_capability", lambda device: capability)

    return set_capability


@pytest.fixture
def emulated(monkeypatch) -> Iterator[Recorder]:
    """FlashInfer's GPU functions: recorded, checked, computed on the CPU."""
    import flashinfer
    import flashinfer.fused_moe
    from flashinfer_contract import check_logits_call, check_routed_call, installed_features
    from flashinfer_cutlass_emulator import check_cutlass_call, emulate_cutlass_moe
    from flashinfer_cutlass_fp8 import check_cutlass_fp8_call, emulate_cutlass_fp8, is_fp8_call
    from flashinfer_emulator import emulate_fp4_quantize, emulate_moe, emulate_routed_moe
    from flashinfer_formats_contract import check_format_call, format_of
    from flashinfer_formats_emulator import emulate_format, emulate_mxfp8_quantize

    flashinfer_library.library()  # reads the signatures of the real functions
    recorder, features = Recorder(), installed_features()

    def checked(nvfp4: Callable | None) -> Callable:
        def run(function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
            check = nvfp4 if format_of(kwargs) == "nvfp4" else check_format_call
            check(
                function,
                args,
                kwargs,
                version_features=features,
                activation=recorder.activation,
                parameters=recorder.parameters,
                tune_max_num_tokens=recorder.tune_max_num_tokens,
            )

        return run

    def stand_in(module: Any, name: str, check: Callable, emulate: Callable) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            check(function, args, kwargs)
            recorder.calls.append((name, kwargs))
            other = "fp4_block" in name and format_of(kwargs) != "nvfp4"
            return emulate_format(name, **kwargs) if other else emulate(**kwargs)

        monkeypatch.setattr(module, name, record)

    def by_keyword(function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        import inspect

        assert not args
        inspect.signature(function).bind(**kwargs)

    experts = flashinfer.fused_moe
    stand_in(flashinfer, "fp4_quantize", by_keyword, emulate_fp4_quantize)
    routed = "trtllm_fp4_block_scale_routed_moe"
    stand_in(experts, routed, checked(check_routed_call), emulate_routed_moe)
    stand_in(experts, "trtllm_fp4_block_scale_moe", checked(check_logits_call), emulate_moe)
    stand_in(flashinfer, "mxfp8_quantize", by_keyword, emulate_mxfp8_quantize)
    for kind in ("block", "per_tensor"):
        for name in (f"trtllm_fp8_{kind}_scale_moe", f"trtllm_fp8_{kind}_scale_routed_moe"):
            if hasattr(experts, name):
                emulate = functools.partial(emulate_format, name)
                stand_in(experts, name, checked(None), emulate)

    def check_cutlass(function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        check = check_cutlass_fp8_call if is_fp8_call(kwargs) else check_cutlass_call
        check(function, args, kwargs)

    def emulate_cutlass(**kwargs: Any) -> Any:
        return (emulate_cutlass_fp8 if is_fp8_call(kwargs) else emulate_cutlass_moe)(**kwargs)

    stand_in(experts, "cutlass_fused_moe", check_cutlass, emulate_cutlass)
    yield recorder
