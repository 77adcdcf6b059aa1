"""What SGLang hands to FlashInfer for a layer, and what fp4moe does, with hidden_alignment 128."""

from __future__ import annotations

import nvfp4_files as files
import pytest
import torch
from compare import Neutral, differences, neutral, one_call, same_quantisation
from gpu import QUANTIZE, ROUTED
from ours import our_calls
from peer_layers import Case, Checkpoint, checkpoint, sglang_cases
from sglang_side import sglang_calls
from tiny_models import COMMON
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@pytest.mark.parametrize("case", sglang_cases, ids=str)
def test_given_routing(case):
    layer = checkpoint(case)
    ours = our_calls(layer.ours(), layer.tokens, hidden_alignment=128)
    theirs = sglang_calls(layer)
    assert [name for name, _ in ours] == [name for name, _ in theirs] == [QUANTIZE, ROUTED]
    assert same_quantisation(one_call(ours, QUANTIZE), one_call(theirs, QUANTIZE))
    call = one_call(theirs, ROUTED)
    assert differences(one_call(ours, ROUTED), call, neutral(call)) == []


# Ours divides by the ratio of the two scales and multiplies by it again, each rounded to 2^-24:
# up to six roundings against SGLang's two.
ROUNDED = Neutral(
    "up's scale reaches the kernel through down's, which is exact but for roundings",
    lambda ours, theirs: (
        ours.shape == theirs.shape and bool(((ours / theirs - 1).abs() <= 8 * 2**-24).all())
    ),
)


def test_gate_and_up_with_scales_of_their_own(tmp_path):
    """SGLang hands both scales to the kernel; ours, read from the same file, says the same."""
    config = Qwen3MoeConfig(
        **COMMON | {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 1},
        num_experts=4,
        num_experts_per_tok=2,
    )
    made = files.make(Qwen3MoeForCausalLM(config), tmp_path / "floats", shared=False)
    for key in made.tensors:
        if key.endswith("input_scale"):
            made.tensors[key] = torch.tensor(0.0456 if "down" in key else 0.0123)
    (weights,) = files.experts(files.load(made.write(tmp_path / "packed")))

    def stacked(part):
        names = ("gate", "up", "down")
        prefix = "model.layers.0.mlp.experts"
        return {
            name: torch.stack(
                [made.tensors[f"{prefix}.{expert}.{name}_proj.{part}"] for expert in range(4)]
            )
            for name in names
        }

    case = Case("apart", 128, 64, experts=4)
    parts = (stacked(part) for part in ("weight", "weight_scale", "weight_scale_2"))
    layer = Checkpoint(case, *parts, 0.0123, 0.0456)
    assert (layer.global_scale["gate"] != layer.global_scale["up"]).all()
    ours = our_calls(weights, layer.tokens, hidden_alignment=128)
    theirs = sglang_calls(layer)
    assert same_quantisation(one_call(ours, QUANTIZE), one_call(theirs, QUANTIZE))
    rounded = {"output1_scale_scalar": ROUNDED, "output2_scale_scalar": ROUNDED}
    call = one_call(theirs, ROUTED)
    assert differences(one_call(ours, ROUTED), call, neutral(call) | rounded) == []


def test_a_size_that_only_ours_pads():
    layer = checkpoint(Case("2880", 2880, 64))
    call = one_call(our_calls(layer.ours(), layer.tokens, hidden_alignment=128), ROUTED)
    assert call["hidden_states"].shape[1] * 2 == 2944
    with pytest.raises(AssertionError):
        sglang_calls(layer)
