"""Write tests/data/llm_compressor: tiny checkpoints by llm-compressor's own `oneshot`.

It needs transformers 5.15 to 5.17, so the tests cannot make them where a newer one is installed.
Run by hand in an environment of its own, on a CPU, in a few seconds a file:

    pip install llmcompressor==0.14.0.1 transformers==5.17.0 torchvision
    python benchmarks/make_llm_compressor_files.py tests/data/llm_compressor
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.utils import load_context
from tokenizers import Tokenizer, models

COMMON = {
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# hidden_size and moe_intermediate_size: more than one block of 128 x 128, the last ones cut off,
# and whole groups of 16 and 32.
BLOCKS, GROUPS = (160, 144), (64, 96)
# Experts of one scheme, attention of another, and a cache in FP8.
MIXED = "NVFP4_with_FP8"
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
CALIBRATED = ("FP8", "NVFP4", MIXED)
SCHEMES = {
    "FP8": GROUPS,
    "FP8_DYNAMIC": GROUPS,
    "FP8_BLOCK": BLOCKS,
    "NVFP4": GROUPS,
    "NVFP4A16": GROUPS,
    "MXFP8": GROUPS,
    "MXFP4A16": GROUPS,
    MIXED: GROUPS,
}
FILES = [
    *(("qwen3_moe", scheme) for scheme in SCHEMES),
    *(("gemma4", scheme) for scheme in ("NVFP4", "FP8_BLOCK")),
    *(("nemotron_h", scheme) for scheme in ("NVFP4", "FP8_DYNAMIC")),
]
# What the recipes of llm-compressor's examples leave alone; `re:` are its regular expressions.
LEFT = ["lm_head", "re:.*mlp.gate$", "re:.*router.*", "re:.*conv1d.*"]


def build(name: str, hidden_size: int, intermediate_size: int) -> transformers.PreTrainedModel:
    """Return a float32 model of random weights, whose experts show in the logits."""
    sizes = {**COMMON, "hidden_size": hidden_size, "moe_intermediate_size": intermediate_size}
    if name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **sizes, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1
        )
    elif name == "gemma4":
        config = transformers.Gemma4TextConfig(
            **sizes,
            num_experts=4,
            top_k_experts=2,
            enable_moe_block=True,
            num_hidden_layers=1,
            global_head_dim=16,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            sliding_window=32,
            layer_types=["full_attention"],
        )
    else:
        config = transformers.NemotronHConfig(
            **sizes,
            layers_block_type=["moe", "full_attention"],
            moe_shared_expert_intermediate_size=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=16,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if ".experts." in key:
            parameter.data.mul_(8)
        if key.endswith("per_expert_scale"):
            parameter.data.uniform_(0.5, 2)
    return model.to(torch.bfloat16)


def write(name: str, scheme: str, directory: pathlib.Path) -> None:
    """Quantise a model by a scheme and save it as llm-compressor does."""
    with tempfile.TemporaryDirectory() as folder:
        build(name, *SCHEMES[scheme]).save_pretrained(folder)
        with load_context():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        if scheme == MIXED:
            recipe = [
                QuantizationModifier(targets=["re:.*experts.*"], scheme="NVFP4", ignore=LEFT),
                QuantizationModifier(
                    targets=["re:.*self_attn.*_proj$"],
                    scheme="FP8_DYNAMIC",
                    kv_cache_scheme=CACHE,
                ),
            ]
        else:
            recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=LEFT)
        options = {}
        if scheme in CALIBRATED:
            ids = torch.randint(1, 64, (4, 32), generator=torch.Generator().manual_seed(0))
            rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
            words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
            options = {
                "dataset": Dataset.from_dict(rows),
                "processor": transformers.PreTrainedTokenizerFast(tokenizer_object=words),
                "num_calibration_samples": 4,
                "max_seq_length": 32,
            }
        oneshot(model=model, recipe=recipe, **options)
        model.save_pretrained(directory, save_compressed=True)


def main() -> None:
    """Write every file of FILES."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    for name, scheme in FILES:
        write(name, scheme, arguments.out / f"{name}_{scheme}")


if __name__ == "__main__":
    main()
