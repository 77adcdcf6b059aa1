"""Train a small Gemma4 and a small NemotronH on the standard library's sources, byte by byte.

Both are the real transformers classes, with a mixture of experts in (nearly) every layer. What is
saved is an ordinary bfloat16 Hugging Face directory with a byte-level tokenizer: a model that has
learnt something, small enough to keep with the tests.

    python benchmarks/train_small_models.py --minutes 4 --out tests/data
    python benchmarks/train_small_models.py --steps 5 --batch 2 --length 64 --device cpu \\
        --held-out-bytes 8192 --out trial
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import lzma
import math
import pathlib
import platform
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fp4moe.tools.sample_text import standard_library_text

HIDDEN = 128
COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    # Byte 0 stands between two files.
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "use_cache": True,
}
BALANCE = 0.01  # weight of the loss that keeps the experts evenly used


def gemma4() -> nn.Module:
    """Four layers: attention, then 16 gated experts (top 4) beside a dense MLP."""
    config = transformers.Gemma4TextConfig(
        **COMMON,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_experts=16,
        top_k_experts=4,
        enable_moe_block=True,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        global_head_dim=32,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    return transformers.Gemma4ForCausalLM(config)


def nemotron_h() -> nn.Module:
    """Mamba, experts, attention, experts, mamba, experts, mamba, experts: 16 experts, top 4."""
    mamba, moe = "linear_attention", "moe"
    config = transformers.NemotronHConfig(
        **COMMON,
        layers_block_type=[mamba, moe, "full_attention", moe, mamba, moe, mamba, moe],
        intermediate_size=192,
        moe_intermediate_size=96,
        moe_shared_expert_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=32,
    )
    return transformers.NemotronHForCausalLM(config)


MODELS = {"small_gemma4": gemma4, "small_nemotron_h": nemotron_h}


def dense_experts(
    self: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Apply every expert to every token, as two large products.

    For sixteen small experts that is faster than sorting tokens, and any device can differentiate
    it. Leaves the balance loss in `self.balance`: 1 where all experts are used alike.
    """
    experts = self.num_experts
    share = weights.new_zeros(len(hidden), experts).scatter(1, ids, weights)
    used = (share > 0).float().mean(0) * (experts / ids.shape[1])
    self.balance = (used.detach() * share.float().mean(0)).sum()
    stacked = self.gate_up_proj if self.has_gate else self.up_proj
    first = F.linear(hidden, stacked.flatten(0, 1)).unflatten(1, (experts, -1))
    inner = self._apply_gate(first) if self.has_gate else self.act_fn(first)
    inner = (inner * share.unsqueeze(2).to(inner.dtype)).flatten(1)
    return F.linear(inner, self.down_proj.transpose(0, 1).flatten(1)).to(hidden.dtype)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text in UTF-8."""
    # The printable stand-ins that byte-level tokenizers use: a byte that prints is itself.
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(b) if b in kept else chr(next(others)): b for b in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def windows(data: torch.Tensor, length: int, batch: int) -> Iterator[torch.Tensor]:
    """Yield the data in order, in batches of windows that do not overlap."""
    count = len(data) // length
    yield from data[: count * length].view(count, length).split(batch)


def mixed_precision(model: nn.Module) -> torch.autocast:
    """bfloat16 products for float32 parameters; on a GPU only, most CPUs are slow at them."""
    weight = next(model.parameters())
    wanted = weight.is_cuda and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=wanted)


def bits_per_byte(model: nn.Module, data: torch.Tensor, length: int, batch: int) -> float:
    """Mean of -log2 p(byte) over windows, each window's first byte left out."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), device=device, dtype=torch.float64), 0
    was_training = model.training
    model.eval()
    with torch.no_grad(), mixed_precision(model):
        for ids in windows(data, length, batch):
            ids = ids.to(device).long()
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            count += ids[:, 1:].numel()
    model.train(was_training)
    return float(total) / count / math.log(2)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def train(
    model: nn.Module, text: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace
) -> int:
    """Train until the time or the steps are over; prints progress; returns the steps made."""
    device = next(model.parameters()).device
    experts = [m for m in model.modules() if hasattr(m, "has_gate")]
    optimizer = optimizer_of(model, options.rate)
    generator = torch.Generator(device=device).manual_seed(1)
    offsets = torch.arange(options.length + 1, device=device)
    started = last_line = last_test = time.monotonic()
    step = 0
    model.train()
    while True:
        elapsed = time.monotonic() - started
        done = elapsed / (60 * options.minutes)
        if options.steps:
            done = max(done, step / options.steps)
        if done >= 1:
            return step
        # Warm-up over 2 % of the run, then a cosine down to nothing.
        rate = options.rate * min(1.0, (step + 1) / 100, done / 0.02 + 0.01)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(
            len(text) - options.length, (options.batch, 1), device=device, generator=generator
        )
        ids = text[starts + offsets].long()
        with mixed_precision(model):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        balance = torch.stack([m.balance for m in experts]).mean()
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 or step == options.steps:
            value = loss.item()  # also keeps the host from running ahead of the clock
            now = time.monotonic()
            if now - last_line > 5 or step == 10 or step == options.steps:
                line = f"{now - started:5.0f} s  step {step:6d}  rate {rate:.2e}  loss {value:.4f}"
                line += f"  bits/byte {value / math.log(2):.4f}  balance {balance.item():.3f}"
                last_line = now
                if now - last_test > 30:
                    part = held_out[: 256 * options.length]
                    bits = bits_per_byte(model, part, options.length, options.batch)
                    line += f"  held out {bits:.4f}"
                    last_test = time.monotonic()
                print(line, flush=True)


def save(model: nn.Module, folder: pathlib.Path) -> None:
    """Write the model in bfloat16 and its tokenizer."""
    # Parameters only: NemotronH keeps its routing bias, a buffer, in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.config._experts_implementation = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(folder: pathlib.Path, data: bytes, options: argparse.Namespace) -> tuple[float, float]:
    """Load what was saved; return its bits per byte in bfloat16, and the share of parameters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(options.device)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    bits = bits_per_byte(model, tensor, options.length, options.batch)
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3 and p.shape[1] > 1)
    return bits, experts / sum(p.numel() for p in model.parameters())


def readme(name: str, facts: list[tuple[str, str]]) -> str:
    """What stands beside the weights."""
    lines = [f"# {name}", "", "Made by `benchmarks/train_small_models.py`; only tests use it.", ""]
    return "\n".join([*lines, "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in facts), ""])


def main() -> None:
    """Train, save and measure each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the folders")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=4, help="time limit of each training")
    parser.add_argument("--steps", type=int, help="limit of steps, if the time does not end first")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--length", type=int, default=512, help="bytes a window")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--held-out-bytes", type=int, help="measure on so many only (on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    text, held_out = (b"\0".join(standard_library_text(part)) for part in (False, True))
    held_out = held_out[: options.held_out_bytes]
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "a CPU"
    rivals = {
        "gzip -9": 8 * len(gzip.compress(held_out, 9)) / len(held_out),
        "xz -9": 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out),
    }
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"text {len(text)} bytes, held out {len(held_out)} bytes: "
        + ", ".join(f"{rival} {bits:.3f} bits/byte" for rival, bits in rivals.items()),
        flush=True,
    )
    tensors = [torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (text, held_out)]
    on_device = [t.to(options.device) for t in tensors]
    for folder_name in options.models:
        torch.manual_seed(0)
        model = MODELS[folder_name]().to(options.device)
        model.set_experts_implementation("dense")
        count = sum(p.numel() for p in model.parameters())
        print(f"\n{folder_name}: {count} parameters, {2e-6 * count:.2f} MB in bfloat16", flush=True)
        steps = train(model, *on_device, options)
        folder = options.out / folder_name
        save(model, folder)
        print(f"saved {folder_name} after {steps} steps", flush=True)
        bits, share = measure(folder, held_out, options)
        limits = f"--minutes {options.minutes:g} --batch {options.batch} --length {options.length}"
        facts = [
            ("command", f"`python benchmarks/train_small_models.py {limits} --out tests/data`"),
            ("date", datetime.datetime.now(datetime.timezone.utc).date().isoformat()),
            ("machine", name),
            (
                "versions",
                f"Python {platform.python_version()}, torch {torch.__version__}, "
                f"transformers {transformers.__version__}",
            ),
            ("parameters", f"{count}, {100 * share:.0f} % of them in experts"),
            ("trained on", f"{len(text)} bytes of the standard library, {steps} steps"),
            ("held-out text", f"{len(held_out)} bytes, see `fp4moe.tools.sample_text`"),
            ("bits per byte there, bfloat16", f"{bits:.4f}"),
            *((f"bits per byte there, {rival}", f"{r:.4f}") for rival, r in rivals.items()),
        ]
        (folder / "README.md").write_text(readme(folder_name, facts), "utf-8")
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{folder_name}: {bits:.4f} bits/byte held out, in bfloat16; {size / 1e6:.2f} MB")
        for label, value in facts:
            print(f"  {label}: {value}", flush=True)


if __name__ == "__main__":
    main()
