"""PEFT's LoRA on packed modules: classes that PEFT makes once `register_peft` was called.

The names, shapes and files are those of PEFT's ParamWrapper and Linear (peft 0.21.2): of E experts
A [r * E, in] and B [out, r * E], and the wrapper of down_proj around that of the first projection.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import refuse
from ..kernels.grouped import check_grouped_kernel
from ..linear import PackedLinear
from ..module import FusedExperts
from .lora import LowRank, experts_with_adapters

__all__ = ["PackedExpertsLora", "PackedLinearLora", "PackedLoraModel"]


def _refuse_merge(module: str) -> NoReturn:
    refuse(
        "merge",
        f"an adapter cannot be merged into {module}",
        "its weights are packed, and the sum would be rounded again to a few bits",
        "Keep the adapter beside them, or merge it into the float model and quantise that.",
    )


def _first(experts: FusedExperts) -> str:
    return "gate_up_proj" if experts.layer.gated else "up_proj"


class PackedExpertsLora(ParamWrapper):
    """The adapter of one float parameter of packed experts, as PEFT's ParamWrapper.

    The outermost one computes; inner ones hold A and B.
    """

    def get_param(self) -> torch.Tensor:
        """Return a tensor of the float parameter's shape [E, out, in]; it has no memory."""
        experts: Any = self.get_base_layer()
        layer = experts.layer
        shape = (1 + layer.gated) * layer.intermediate_size, layer.hidden_size
        if self.parameter_name == "down_proj":
            shape = layer.hidden_size, layer.intermediate_size
        place = experts.prepared_down_packed.device
        return torch.zeros((), dtype=torch.float32, device=place).expand(layer.num_experts, *shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse."""
        _refuse_merge("packed experts")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the packed experts alone."""
        if merge:
            self.merge()
        return self.get_base_layer()

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Apply the experts with every active adapter."""
        self._check_forward_args(hidden_states, top_k_index, top_k_weights, **kwargs)
        layer: Any = self
        adapters: dict[str, list[LowRank]] = {}
        while isinstance(layer, PackedExpertsLora):
            place = "down" if layer.parameter_name == "down_proj" else "first"
            adapters[place] = layer._active()
            layer = layer.base_layer
        if not any(adapters.values()):
            return layer(hidden_states, top_k_index, top_k_weights)
        return experts_with_adapters(layer, hidden_states, top_k_index, top_k_weights, adapters)

    def _active(self) -> list[LowRank]:
        if self.disable_adapters:
            return []
        found = []
        for name in self.active_adapters:
            if name in self.lora_A:
                factors: Any = self.lora_A[name], self.lora_B[name]
                down, up = (factor.weight for factor in factors)
                # As ParamWrapper.get_delta_weight reads them: rank is the slower axis of B's rows.
                down = down.reshape(self.num_experts, -1, down.shape[1])
                up = up.reshape(up.shape[0], -1, self.num_experts).permute(2, 0, 1)
                found.append(LowRank(down, up, self.scaling[name]))
        return found


class PackedLinearLora(Linear):
    """The adapter of a PackedLinear, as PEFT's Linear."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        # Its weight is codes, whose dtype is no adapter's.
        return base_layer.prepared_weight.device, None

    @property
    def lora_variants(self) -> dict:
        """Only plain LoRA: the variants read or change the weight."""
        return LoraLayer.lora_variants.fget(self)  # type: ignore[attr-defined]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse."""
        _refuse_merge("a PackedLinear")


class PackedLoraModel(LoraModel):
    """PEFT's LoRA that knows packed experts and Linears; anything else is as it was."""

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        found = super()._inject_parameters(peft_config, model, adapter_name, low_cpu_mem_usage)
        targets = sorted(peft_config.target_parameters)
        for path, module in list(model.named_modules()):
            if not isinstance(module, FusedExperts):
                continue
            plain = path.replace(".base_layer", "")
            for name in (_first(module), "down_proj"):
                key = f"{plain}.{name}"
                if key not in targets and not any(key.endswith(f".{end}") for end in targets):
                    continue
                _check_experts(plain, module)
                self._wrap(peft_config, model, adapter_name, plain, name, key)
                found.append(key)
        return found

    def _wrap(self, config, model, adapter_name, path, name, key) -> None:
        """Add an adapter to the wrapper of a parameter, or a wrapper around what is there."""
        parent, _, child = path.rpartition(".")
        holder = model.get_submodule(parent)
        target = outer = getattr(holder, child)
        while isinstance(target, PackedExpertsLora) and target.parameter_name != name:
            target = target.base_layer
        target = target if isinstance(target, PackedExpertsLora) else outer
        self._check_target_module_compatiblity(config, model, child)
        self._create_and_replace(
            config, adapter_name, target, child, holder, current_key=key, parameter_name=name
        )

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, FusedExperts) and kwargs.get("parameter_name"):
            return PackedExpertsLora(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(base, PackedLinear):
            if base.parts:
                what, reason = (
                    "a quantised Linear cannot have an adapter",
                    f"it holds {base.parts[0]}",
                )
                refuse("register_peft", what, reason, "Load all of it on one process.")
            return PackedLinearLora(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(new_module, (PackedExpertsLora, PackedLinearLora)):
            # A and B are where the packed weights are; PEFT would look for a float weight.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        # Before the first module changes.
        for path, module in self.model.named_modules():
            if isinstance(module, (PackedExpertsLora, PackedLinearLora)):
                _refuse_merge(path)


def _check_experts(path: str, experts: FusedExperts) -> None:
    """Raise where adapters of the float parameters have no place."""
    layer, local = experts.layer, experts.prepared_down_packed.shape[0]
    what = f"the experts at {path} cannot have adapters"
    if experts.float_layout is None:
        reason = "they did not come from one stacked parameter, or factors moved from up to down"
        refuse("register_peft", what, reason, "Adapt attention alone, or the float model.")
    if "forward" in vars(experts):
        reason = "their forward was replaced on the instance, as parallelism and hooks do"
        refuse("register_peft", what, reason, "Load the whole layer on one process, without hooks.")
    if local != layer.num_experts:
        reason = f"{local} of {layer.num_experts} are here"
        refuse("register_peft", what, reason, "Load the whole layer on one process.")
    check_grouped_kernel(experts.kernel, caller="register_peft")
