"""SGLang's side: its own ModelOpt method for NVFP4 experts, from its weight loader to the call.

Stand-ins, beside those of gpu.py: the claim of a Blackwell GPU, a plain module for FusedMoE (whose
constructor wants a server), whose loader is FusedMoE's own, and two packages that only notebooks
and images need. `sglang` itself is not initialised: that patches transformers and starts the
language front end.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from gpu import Call, install, recorded
from peer_layers import Checkpoint

__all__ = ["sglang_calls"]

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu", "relu2": "relu2"}
# torchvision must be built for the installed torch, which a CPU build has none of.
ABSENT = ("IPython", "torchvision")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find the packages of ABSENT as modules in which every name is an empty object."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return mock.MagicMock(name=f"{module.__name__}.{name}")

        module.__getattr__ = attribute  # type: ignore[method-assign]


@functools.cache
def _import() -> None:
    install()
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # keeps its answer, which is about the real package
    sys.meta_path.append(_Absent())
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations, "run make peers"
    package = types.ModuleType("sglang")
    package.__spec__ = importlib.machinery.ModuleSpec("sglang", None, is_package=True)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["sglang"] = package
    # SGLang goes without FlashInfer's communication where it cannot be imported, as without CUDA.
    sys.modules["flashinfer.comm"] = None  # type: ignore[assignment]
    import sglang.srt.layers.moe.token_dispatcher.standard

    del sys.modules["flashinfer.comm"]
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as trtllm
    import sglang.srt.layers.quantization.modelopt_quant  # noqa: F401
    from sglang.srt.layers.quantization import fp4_utils

    # Both are what a machine with a GPU finds at import.
    trtllm.fp4_quantize = fp4_utils._flashinfer_fp4_quantize_impl
    trtllm.trtllm_moe_enable_pdl = lambda num_tokens: True


@contextlib.contextmanager
def on_blackwell() -> Iterator[None]:
    """Let SGLang believe in a Blackwell GPU and in the server's choice of this kernel."""
    _import()
    from sglang.srt.layers.moe.utils import MoeRunnerBackend
    from sglang.srt.runtime_context import get_flags, get_parallel, override_platform

    platform = override_platform(is_blackwell=True, is_sm100=True)
    backend = MoeRunnerBackend.FLASHINFER_TRTLLM_ROUTED
    group = types.SimpleNamespace(world_size=1)
    with (
        mock.patch.object(get_flags().moe, "runner_backend", backend),
        get_parallel().override(tp_group=group),
    ):
        platform.install()
        try:
            yield
        finally:
            platform.restore()


def sglang_calls(layer: Checkpoint) -> list[tuple[str, Call]]:
    """Return the calls for given ids and weights."""
    hidden, ids, weights = layer.tokens
    with on_blackwell(), recorded() as calls:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        experts, method = _build(layer)
        chosen = StandardTopKOutput(weights, ids, torch.empty(0))
        method.apply(experts, StandardDispatchOutput(hidden, None, chosen))
    return calls


def _build(layer: Checkpoint) -> tuple[torch.nn.Module, Any]:
    """Return the layer with its weights prepared, and SGLang's method of it."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.quantization.modelopt_quant import (
        ModelOptFp4Config,
        ModelOptNvFp4FusedMoEMethod,
    )

    case = layer.case
    experts = torch.nn.Module()
    config = ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16)
    runner = MoeRunnerConfig(
        num_experts=case.num_experts,
        num_local_experts=case.experts,
        hidden_size=case.hidden,
        intermediate_size_per_partition=case.intermediate,
        top_k=case.top_k,
        activation=ACTIVATIONS[case.activation],
        is_gated=case.gated,
        layer=experts,
    )
    method = ModelOptNvFp4FusedMoEMethod(config)
    attributes = {
        "moe_runner_config": runner,
        "num_experts": case.num_experts,
        "num_local_experts": case.experts,
        "moe_ep_rank": case.rank,
        "moe_ep_size": case.ranks,
        "moe_tp_rank": 0,
        "moe_tp_size": 1,
        "quant_method": method,
        "quant_config": config,
        "use_padded_loading": False,
        "use_presharded_weights": False,
        "use_triton_kernels": False,
        "dispatcher": mock.Mock(spec=["set_quant_config"]),
        "_mega_moe_nvfp4": False,
    }
    for name, value in attributes.items():
        setattr(experts, name, value)
    method.create_weights(
        experts,
        num_experts=case.experts,
        hidden_size=case.hidden,
        intermediate_size_per_partition=case.intermediate,
        params_dtype=torch.bfloat16,
        weight_loader=None,
    )
    method.create_moe_runner(experts, runner)
    _load(FusedMoE, experts, layer)
    method.process_weights_after_loading(experts)
    return experts, method


def _load(fused_moe: Any, experts: torch.nn.Module, layer: Checkpoint) -> None:
    """Fill the parameters: matrices through FusedMoE's own loader, scales of tensors by hand."""
    shards = {"gate": "w1", "up": "w3"} if layer.case.gated else {"up": "w1"}
    for suffix, source in (("weight", layer.packed), ("weight_scale", layer.block_scale)):
        first, second = (getattr(experts, f"{name}_{suffix}").data for name in ("w13", "w2"))
        for expert in range(layer.case.experts):
            for name, shard in shards.items():
                fused_moe._load_w13(experts, first[expert], 0, shard, source[name][expert])
            fused_moe._load_w2(experts, second[expert], 1, "w2", source["down"][expert])
    globals_ = [layer.global_scale[name] for name in shards]
    for name, scale in (
        ("w13_weight_scale_2", torch.stack(globals_, 1) if len(globals_) > 1 else globals_[0]),
        ("w2_weight_scale_2", layer.global_scale["down"]),
    ):
        parameter = getattr(experts, name)
        assert parameter.shape == scale.shape, name
        parameter.data = scale.clone()
    experts.w13_input_scale.data.fill_(layer.hidden_scale)
    experts.w2_input_scale.data.fill_(layer.intermediate_scale)
