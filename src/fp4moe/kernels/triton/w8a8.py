"""Kernel `triton_w8a8`: FP8 experts with FP8 activations, for compute capability 8.9 and newer.

What checkpoints with "W8A8" in their name were made for: hidden and intermediate are rounded to
e4m3 by the format's rule (`round_activation`: a stored scale, one of each token, or one of each 128
columns), and the tensor cores multiply e4m3. `auto` takes it only for such checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..base import Kernel, current_capability, logical_layout
from ..devices import Devices
from ..measured import choose_tiles
from ..operands import Call, LogitsCall
from .kernel import TRITON, constants_of, find_slots, interpreted
from .tiles import MODES, Config

__all__ = ["TRITON_W8A8", "TritonW8A8Kernel", "run_with"]

FP8_FORMATS = ("fp8", "fp8_channel", "fp8_block")


class TritonW8A8Kernel(Kernel):
    """Triton kernels that multiply e4m3 with e4m3.

    hidden is rounded to bfloat16, then to e4m3; the intermediate likewise. Sums of up to 128
    columns are the tensor core's, the sum of these is in float32. Weights lie as in the checkpoint.
    """

    name = "triton_w8a8"
    needs = "triton"
    devices = Devices(((8, 9),), or_newer=True)
    automatic = False
    biases = parameters = quantizes_activations = True
    product_dtype = torch.float32
    layouts: ClassVar = {name: logical_layout(FORMATS[name].multiple) for name in FP8_FORMATS}

    def automatic_for(self, layer: Layer) -> bool:
        """Whether the checkpoint was made for rounded activations."""
        return layer.quantized_activations

    def package_reasons(self) -> Sequence[str]:
        """Return that triton is not installed, where it is not."""
        return TRITON.package_reasons()

    def limit_reasons(self, layer: Layer) -> list[str]:
        """Return which number is too large: of experts, or of experts a token."""
        return TRITON.limit_reasons(layer)

    def check_device(self, call: Call | LogitsCall) -> None:
        """Raise where Triton does not run; its interpreter runs anywhere."""
        if not interpreted():
            super().check_device(call)

    def run(self, call: Call) -> torch.Tensor:
        """Compute [T, H] with the tiles that were measured to be fast."""
        local, hidden_size, intermediate_size = call.operands.down_packed.shape
        config = choose_tiles(
            current_capability(call.hidden.device), call.layer.gated, hidden_size,
            intermediate_size, local, call.expert_ids.numel(), call.layer.format, w8a8=True,
        )  # fmt: skip
        return run_with(config, call)


def run_with(config: Config, call: Call) -> torch.Tensor:
    """Compute [T, H], T > 0, with given tiles."""
    from .activation import activation_constants
    from .gemm_w8a8 import down_w8a8_kernel, gate_up_w8a8_kernel
    from .round_e4m3 import round_rows
    from .sort import sum_slots

    operands, layer, hidden = call.operands, call.layer, call.hidden
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    ids = call.expert_ids.contiguous()
    weights = call.routing_weights.to(torch.float32).contiguous()
    local, hidden_padded, intermediate = operands.down_packed.shape
    window = layer.expert_offset, local
    form: dict[str, Any] = {"MODE": MODES.index(config.mode), "FORMAT": layer.format}
    form["ASSEMBLY"] = not interpreted()
    static = layer.format == "fp8"
    with torch.cuda.device_of(hidden):
        first, second = find_slots(config, ids, window)
        dtype = torch.float8_e4m3fn if static else torch.bfloat16
        middle = hidden.new_empty((ids.numel(), intermediate), dtype=dtype)
        partial = hidden.new_empty((ids.numel(), hidden_padded), dtype=torch.bfloat16)
        x, x_scale = round_rows(
            hidden, hidden_padded, operands.hidden_scale, layer.format, form["ASSEMBLY"]
        )
        tile = constants_of(config.gate_up)
        gate_up_w8a8_kernel[(first.most * -(-intermediate // config.gate_up.rows),)](
            x, x_scale, ids, *first[:3], _codes(operands.gate_up_packed),
            operands.gate_up_block_scale, operands.intermediate_scale, operands.gate_up_bias,
            middle, ids.numel(), ids.shape[1], hidden_padded, intermediate, *window, 1.0,
            **form, **tile, WHOLE=hidden_padded % (tile["SLABS"] * 64) == 0, GATED=layer.gated,
            **activation_constants(layer.activation),
        )  # fmt: skip
        y, y_scale = middle, operands.intermediate_scale
        if not static:
            y, y_scale = round_rows(y, intermediate, y_scale, layer.format, form["ASSEMBLY"])
        tile = constants_of(config.down)
        down_w8a8_kernel[(second.most * -(-hidden_padded // config.down.rows),)](
            y, y_scale, ids, *second[:3], _codes(operands.down_packed), operands.down_block_scale,
            operands.intermediate_scale, operands.down_bias, weights, partial, ids.numel(),
            hidden_padded, intermediate, *window, 1.0, **form, **tile,
            WHOLE=intermediate % (tile["SLABS"] * 64) == 0,
        )  # fmt: skip
        return sum_slots(partial, ids, window, hidden.new_empty(hidden.shape))


def _codes(packed: torch.Tensor) -> torch.Tensor:
    return packed.view(torch.float8_e4m3fn)


TRITON_W8A8 = TritonW8A8Kernel()
