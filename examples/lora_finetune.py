"""Teach a small Gemma4 with packed NVFP4 experts a style: LoRA beside and inside them, on a CPU.

The model was trained on Python code; it learns to write like this repository's README. Adapters of
attention, of the router and of the experts are trained; what is packed stays packed. The files are
PEFT's own: they load on the float model, too.

Run: python examples/lora_finetune.py
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoTokenizer

import fp4moe

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "data" / "small_gemma4"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "router.proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LENGTH, BATCH = 128, 8
PROMPT = "* `"


def read_text(tokenizer, path: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of LENGTH tokens to train on, and the last eighth of the text, held out."""
    ids = torch.tensor(tokenizer(path.read_text("utf-8"))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out = max(1, len(rows) // 8)
    return rows[:-held_out], rows[-held_out:]


def evaluate(model, rows: torch.Tensor) -> float:
    """Return the mean loss of the rows, nats a token."""
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


def write(model, tokenizer) -> str:
    """Return the likeliest continuation of the prompt."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.eval().generate(**prompt, max_new_tokens=60, do_sample=False)
    return repr(tokenizer.decode(written[0]))


def train(model, rows: torch.Tensor, steps: int) -> None:
    """Take AdamW steps on random rows; only what requires a gradient changes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    with tqdm(range(steps), unit="step") as bar:
        for _ in bar:
            batch = rows[torch.randint(len(rows), (BATCH,))]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    """Load, train, compare, and load the adapter again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "README.md")
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, held_out = read_text(tokenizer, options.text)
    model = fp4moe.from_pretrained(options.model, dtype=torch.float32)
    print(fp4moe.explain(model))
    # PEFT adapts packed modules from here on.
    fp4moe.register_peft()
    targets = {"target_modules": TARGETS, "target_parameters": EXPERTS}
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, **targets))
    model.print_trainable_parameters()
    before = evaluate(model, held_out), write(model, tokenizer)
    start = time.perf_counter()
    train(model, rows, options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - start:.0f} s")
    after = evaluate(model, held_out), write(model, tokenizer)
    print(f"held-out loss: {before[0]:.3f} before, {after[0]:.3f} after")
    print(f"before: {before[1]}\nafter:  {after[1]}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = fp4moe.from_pretrained(options.model, dtype=torch.float32)
        again = PeftModel.from_pretrained(again, folder)
        print(f"held-out loss of the adapter loaded again: {evaluate(again, held_out):.3f}")


if __name__ == "__main__":
    main()
