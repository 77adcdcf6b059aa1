"""vLLM's side: its own RoutedExperts layer of a ModelOpt checkpoint, from loading to the call.

Stand-ins, beside those of gpu.py: the claim of a Blackwell GPU, the tensor-parallel group of one,
the operator of vLLM's compiled quantiser, and what torch.accelerator says without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from gpu import Call, install, quantize, recorded
from peer_layers import Checkpoint

from fp4moe import Activation

__all__ = ["build", "on_blackwell", "vllm_calls", "vllm_calls_from_logits"]

ACTIVATIONS = {"silu": "SILU", "gelu_tanh": "GELU_TANH", "relu2": "RELU2_NO_MUL"}
# What vLLM imports from elsewhere once it takes itself to be on a GPU.
MODULES = (
    "vllm.model_executor.layers.quantization.online.fp8",
    "vllm.model_executor.layers.fused_moe.experts.trtllm_nvfp4_moe",
    "vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe",
    "vllm.model_executor.layers.fused_moe.experts.fused_humming_moe",
)
_library: list[torch.library.Library] = []


@functools.cache
def _import() -> None:
    install()
    # vLLM takes FlashInfer for usable only with nvcc or the cubins; the calls are recorded here.
    os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    for name in MODULES:
        __import__(name)
    from vllm.v1.worker.workspace import init_workspace_manager

    init_workspace_manager(torch.device("cpu"))
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, "
        "Tensor(a!) output, Tensor(b!) output_scale) -> ()"
    )

    def scaled_fp4_quant(input, input_scale, is_sf_swizzled_layout, *, output, output_scale):
        packed, scale = quantize(input, input_scale, is_sf_swizzled_layout)
        output.copy_(packed)
        # Swizzled scales are handed about as int32.
        output_scale.view(torch.uint8).view(-1).copy_(scale.reshape(-1))

    library.impl("scaled_fp4_quant.out", scaled_fp4_quant, "CPU")
    _library.append(library)


@contextlib.contextmanager
def on_blackwell() -> Iterator[None]:
    """Let vLLM believe in a GPU of capability 10.0, and torch put what is for it on the CPU."""
    _import()
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    claims = {
        "_enum": PlatformEnum.CUDA,
        "device_type": "cpu",
        "get_device_capability": classmethod(lambda cls, device_id=0: DeviceCapability(10, 0)),
    }
    group = types.SimpleNamespace(rank_in_group=0, world_size=1)
    with contextlib.ExitStack() as stack:
        for name, value in claims.items():
            stack.enter_context(mock.patch.object(type(current_platform), name, value))
        stack.enter_context(mock.patch.object(parallel_state, "_TP", group))
        cpu = torch.device("cpu")
        accelerator = {"current_device_index": lambda: cpu, "empty_cache": lambda: None}
        for name, value in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor))
        yield


def build(layer: Checkpoint, routing_method: str = "Custom", backend: str = "auto") -> Any:
    """Return vLLM's RoutedExperts with the layer's weights, prepared for its kernel."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    case = layer.case
    name, parameters = _activation(case.activation)
    parallel = FusedMoEParallelConfig.make_no_parallel()
    if case.ranks > 1:
        parallel.use_ep, parallel.ep_size, parallel.ep_rank = True, case.ranks, case.rank
    config = FusedMoEConfig(
        num_experts=case.num_experts,
        experts_per_token=case.top_k,
        hidden_dim=case.hidden,
        intermediate_size=case.intermediate,
        num_local_experts=case.experts,
        num_logical_experts=case.num_experts,
        activation=MoEActivation[name],
        **parameters,
        device="cpu",
        routing_method=RoutingMethodType[routing_method],
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        moe_backend=backend,
    )
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=case.top_k,
        global_num_experts=case.num_experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    experts = RoutedExperts(
        "experts",
        torch.bfloat16,
        config,
        ModelOptNvFp4Config(is_checkpoint_nvfp4_serialized=True),
        manager,
        ckpt_up_proj_name="up_proj" if case.gated else None,
    )
    # vLLM's models set these on the layer, too.
    for attribute, value in parameters.items():
        setattr(experts, attribute, value)
    _load(experts, layer)
    experts.quant_method.process_weights_after_loading(experts)
    return experts


def _activation(text: str) -> tuple[str, dict[str, float]]:
    """Return vLLM's name, and what its models pass to the layer beside it."""
    found = Activation.parse(text)
    if found.plain:
        return ACTIVATIONS[text], {}
    limit = {"swiglu_limit": found.limit}
    if (found.alpha, found.beta) == (1, 0):
        return ACTIVATIONS[found.name], limit
    # Gate and up are not interleaved here.
    both = {"swiglu_alpha": found.alpha, "swiglu_beta": found.beta}
    return "SWIGLUOAI_UNINTERLEAVE", {**limit, **both}


def _load(experts: Any, layer: Checkpoint) -> None:
    """Fill the parameters as vLLM's weight loader does: gate first."""
    first = ["gate", "up"] if layer.case.gated else ["up"]
    tensors = {
        "w13_weight": torch.cat([layer.packed[name] for name in first], 1),
        "w13_weight_scale": torch.cat([layer.block_scale[name] for name in first], 1),
        "w13_weight_scale_2": torch.stack([layer.global_scale[name] for name in first], 1),
        "w2_weight": layer.packed["down"],
        "w2_weight_scale": layer.block_scale["down"],
        "w2_weight_scale_2": layer.global_scale["down"],
    }
    parameters = dict(experts.named_parameters())
    scales = {"w13_input_scale": layer.hidden_scale, "w2_input_scale": layer.intermediate_scale}
    assert parameters.keys() == tensors.keys() | scales.keys()
    for name, tensor in tensors.items():
        assert parameters[name].shape == tensor.shape, name
        parameters[name].data = tensor.clone()
    for name, scale in scales.items():
        parameters[name].data.fill_(scale)


def _padded(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Pad as vLLM's runner does before it calls the layer."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runner = types.SimpleNamespace(
        _quant_method=experts.quant_method,
        moe_config=experts.moe_config,
        routed_output_transform=None,
    )
    return MoERunner._maybe_pad_hidden_states(runner, None, hidden)[0]


def vllm_calls(layer: Checkpoint, backend: str = "auto") -> list[tuple[str, Call]]:
    """Return the calls for given ids and weights."""
    hidden, ids, weights = layer.tokens
    with on_blackwell(), recorded() as calls:
        experts = build(layer, backend=backend)
        padded = _padded(experts, hidden)
        experts.quant_method.apply(experts, padded, weights, ids, None, None)
    return calls


def vllm_calls_from_logits(
    layer: Checkpoint, method: str, logits: torch.Tensor, **routing: Any
) -> list[tuple[str, Call]]:
    """Return the calls where the kernel routes; `routing` are attributes of vLLM's layer."""
    with on_blackwell(), recorded() as calls:
        experts = build(layer, method)
        for name, value in routing.items():
            setattr(experts, name, value)
        padded = _padded(experts, layer.tokens[0])
        experts.quant_method.apply_monolithic(experts, padded, logits)
    return calls
