"""Write a quantised copy of a checkpoint, load it, and compare it with replace_moe in memory.

Run: python examples/quantize_and_reload.py [--format fp8]
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fp4moe
from fp4moe.report import format_bytes

MODEL = pathlib.Path(__file__).resolve().parents[1] / "tests" / "data" / "small_gemma4"
PROMPT = "def main(argv=None):\n"


def weight_bytes(folder: pathlib.Path) -> str:
    """Return the size of the weight files of a checkpoint."""
    return format_bytes(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


@torch.no_grad()
def main() -> None:
    """Quantise, load, compare logits, and write a few lines of text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    parser.add_argument("--format", choices=fp4moe.formats.FORMATS, default="nvfp4")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompt = tokenizer(PROMPT, return_tensors="pt")

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    replaced = fp4moe.replace_moe(model, format=options.format)
    with tempfile.TemporaryDirectory() as folder:
        written = pathlib.Path(folder) / options.format
        fp4moe.quantize_checkpoint(options.model, written, format=options.format)
        print(f"weights: {weight_bytes(options.model)} -> {weight_bytes(written)}")
        loaded = fp4moe.from_pretrained(written, dtype=torch.bfloat16)
    print(fp4moe.explain(loaded))
    if not torch.equal(loaded(**prompt).logits, replaced(**prompt).logits):
        raise SystemExit("the loaded model and replace_moe differ")
    print("the loaded model and replace_moe give the same logits, bit for bit")
    out = loaded.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    main()
