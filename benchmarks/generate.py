"""Whole models through generate(): time and memory, bf16 against NVFP4, checked before printed.

    python benchmarks/generate.py --model gemma4 --minutes 9 --json gemma4.json
    python benchmarks/generate.py --tiny --batch 1 2 --new-tokens 6

Gemma4-26B-A4B (text) and Nemotron-3-Nano-30B-A3B at full size, random weights, greedy, a static
cache, with which generate() compiles decoding; one process for each model and setting:

    huggingface  the bf16 model as it is
    replace_moe  after fp4moe.replace_moe
    linears      so, and dense Linears quantised as the publishers' checkpoints have them: Gemma4's
                 attention and MLP NVFP4, Nemotron's Mamba projections and shared experts FP8
    fused        after fp4moe.replace_moe(routing="fused")
    backend      CompileConfig(backend=fp4moe.backend); the weights stay bf16, beside packed ones

decode_ms: median step after a prompt of 128 tokens, compiled anew for each batch. no_looks_ms: the
same without the backend's looks at the float weights' values, by turns in one process. prefill_ms:
until the first token of a prompt of 512, in eager, but for the backend: generate() compiles a
prefill only with prefill_chunk_size, which is the whole prompt here. Without mamba_ssm the scan of
transformers itself makes Nemotron's slow, and too large at batch 64. Its decoding at batch 64 fits
beside fp4moe.backend with
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. model_gib: parameters, buffers and packed weights.
peak_gib: allocated at most while timed. Without a CUDA device, --tiny shows that it runs, no more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generate_models import SIZES, build, pack_linears
from generate_tools import DEVICE, Backend, Clock, print_rows, without_looks, write

import fp4moe
from fp4moe.linear import PackedLinear
from fp4moe.models.replace import find_candidates
from fp4moe.testing import relative_error

SETTINGS = ("huggingface", "replace_moe", "linears", "fused", "backend")
GIB = 2**30
# Two compilations, then a warm-up, a recording and replays of the CUDA graph.
WARM_UP = 8
PROMPT, PREFILL, PREFILLS, CHECKED = 128, 512, 3, 4
# Of an experts' output: 9.5 % RMS a quantised weight, three projections in quadrature, half again.
LAYER = 0.25
# Of the logits. All layers at a twentieth of the width, on a CPU: other roundings change them by
# 0.01 to 0.07, NVFP4 by 0.04 to 0.09, experts that give nothing by 0.19 to 0.28.
LOGITS = 0.15
# With Linears: far below what unrelated logits differ by, the root of 2. What each Linear computes
# is compared with its decoded weight in float32: a rounding of the weight and one of the output.
LOGITS_LINEARS, LINEAR = 0.5, 2 * 2.0**-8


def within(what: str, error: float, limit: float) -> float:
    if not error <= limit:
        raise SystemExit(f"generate: {what} must be within {limit}; got {error:.3g}. Not timed.")
    return error


def logits_of(model: Callable, ids: torch.Tensor) -> torch.Tensor:
    """Logits after the last token, without a cache: [rows, vocabulary]."""
    with torch.no_grad():
        return model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def peak_gib() -> float | None:
    """What the device allocated at most since the last call; None on a CPU."""
    if DEVICE == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


class Run:
    """One model in one setting: built, checked, then timed batch by batch."""

    def __init__(self, name: str, setting: str, args: argparse.Namespace):
        self.name, self.setting, self.args, self.facts = name, setting, args, ""
        self.backend = Backend(args.kernel, "inductor" if DEVICE == "cuda" else "eager")
        self.model = build(name, args.tiny, args.layers, DEVICE)
        self.blocks = len(find_candidates(self.model))
        self.bytes = self.bf16_bytes = held_bytes(self.model)
        if setting == "huggingface":
            return
        ids = self.ids(CHECKED, 32)
        bf16 = logits_of(self.model, ids)
        packed = self.replace(ids)
        logits = logits_of(self.model, ids)
        if setting == "linears":
            self.check_linears(ids)
        limit = LOGITS_LINEARS if setting == "linears" else LOGITS
        self.check("logits against bf16", relative_error(logits, bf16), limit)
        self.bytes = held_bytes(self.model)
        if setting == "backend":
            del self.model
            gc.collect()
            self.model = build(name, args.tiny, args.layers, DEVICE)
            self.bytes = self.bf16_bytes + packed
            # The same operator on the same bytes, and nothing else compiled.
            as_it_is = Backend(args.kernel, "eager")
            other = logits_of(torch.compile(self.model, backend=as_it_is), ids)
            self.check("logits against replace_moe", relative_error(other, logits), LOGITS)
            as_it_is.require(self.blocks)

    def ids(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        size = (batch, length)
        return torch.randint(3, self.model.config.vocab_size, size, generator=generator).to(DEVICE)

    def check(self, what: str, error: float, limit: float) -> None:
        self.facts += f", {what} {within(what, error, limit):.3g}"

    def replace(self, ids: torch.Tensor) -> int:
        """Replace, compare each layer on its own bf16 input; return the bytes of packed experts."""
        seen: dict[str, tuple] = {}
        hooks = [
            self.model.get_submodule(candidate.path).register_forward_hook(
                lambda _, inputs, output, path=candidate.path: seen.update({path: (inputs, output)})
            )
            for candidate in find_candidates(self.model)
        ]
        logits_of(self.model, ids)
        for hook in hooks:
            hook.remove()
        started = time.perf_counter()
        peak_gib()
        routing = "fused" if self.setting == "fused" else "given"
        fp4moe.replace_moe(self.model, self.args.kernel, routing=routing, progress=False)
        if self.setting == "linears":
            pack_linears(self.model, self.name, self.args.kernel)
        self.facts += f", replaced in {time.perf_counter() - started:.0f} s, peak GiB {peak_gib()}"
        layers = {path: self.model.get_submodule(path) for path in seen}
        self.facts += f", kernel {next(iter(layers.values())).kernel}"
        # A layer that chooses its experts takes logits, which the bf16 one does not.
        if routing == "given":
            with torch.no_grad():
                errors = [
                    relative_error(layer(*seen[path][0]), seen[path][1])
                    for path, layer in layers.items()
                ]
            self.check("worst layer against bf16", max(errors), LAYER)
        return sum(layer.nbytes for layer in layers.values())

    def check_linears(self, ids: torch.Tensor) -> None:
        """Compare each packed Linear with its own decoded weight on its own input."""
        errors: list[float] = []

        def compare(linear: PackedLinear, inputs: tuple, output: torch.Tensor) -> None:
            exact = inputs[0].float() @ linear.dequantized().float().T
            errors.append(relative_error(output, exact))

        packed = [m for m in self.model.modules() if isinstance(m, PackedLinear)]
        hooks = [linear.register_forward_hook(compare) for linear in packed]
        logits_of(self.model, ids)
        for hook in hooks:
            hook.remove()
        self.check(f"worst of {len(packed)} Linears", max(errors), LINEAR)

    def generate(self, ids: torch.Tensor, new_tokens: int, length: int, **options: Any) -> Any:
        """Generate greedily, with a static cache for `length` tokens."""
        from transformers import CompileConfig

        if self.setting == "backend":
            options["compile_config"] = CompileConfig(backend=self.backend)
        elif DEVICE == "cpu":
            options["compile_config"] = CompileConfig(backend="eager")
        if DEVICE == "cpu":
            options["compile_config"].mode = None
            options["compile_config"]._compile_all_devices = True
        # generate() would give every cache the longest length so far.
        self.model._previous_max_cache_length = -1
        mask = torch.ones_like(ids)
        options |= {"do_sample": False, "cache_implementation": "static", "max_cache_len": length}
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)

    def warm_up(self, ids: torch.Tensor, length: int) -> float:
        """Compile decoding; return how far a replayed graph's logits are from eager ones."""
        if DEVICE == "cuda":
            # What the allocator hands out next is NaN, so that a value nobody wrote shows.
            torch.full((GIB // 4,), torch.nan, device=DEVICE)
        out = self.generate(ids, WARM_UP, length, return_dict_in_generate=True, output_logits=True)
        if not all(bool(step.isfinite().all()) for step in out.logits):
            raise SystemExit("generate: logits must be finite; got others. Not timed.")
        if self.setting == "backend":
            self.backend.require(self.blocks)
        # The backend's own eager mode is bf16.
        expected = logits_of(self.model, out.sequences[:CHECKED, :-1])
        return within("decoded logits", relative_error(out.logits[-1][:CHECKED], expected), LOGITS)

    def measure(self, batch: int) -> dict[str, Any]:
        """Warm up, check and time one batch; return its row."""
        torch.compiler.reset()
        if DEVICE == "cuda":
            # Older versions of torch reset these with their own backends only.
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        gc.collect()
        ids = self.ids(batch, 16 if self.args.tiny else PROMPT)
        length = ids.shape[1] + max(self.args.new_tokens, WARM_UP)
        error = self.warm_up(ids, length)
        peak_gib()
        steps = self.steps(ids, length)
        row = {"model": self.name, "setting": self.setting, "batch": batch}
        if self.setting == "backend":
            with without_looks():
                bare = self.steps(ids, length)
            steps += self.steps(ids, length)
            with without_looks():
                bare += self.steps(ids, length)
            row["no_looks_ms"] = round(statistics.median(bare), 3)
        decode = statistics.median(steps)
        row |= {"prefill_ms": None, "decode_ms": round(decode, 3), "note": ""}
        if self.setting == "backend":
            row["note"] = f"{row['no_looks_ms']} ms without looks"
        try:
            row["prefill_ms"] = self.prefill_ms(batch)
        except torch.OutOfMemoryError as problem:
            row["note"] += f" prefill: {str(problem).partition('. ')[0]}"
        return row | {
            "tokens_per_s": round(batch * 1e3 / decode, 1),
            "peak_gib": peak_gib(),
            "model_gib": round(self.bytes / GIB, 4),
            "of_bf16": round(self.bytes / self.bf16_bytes, 4),
            "logits_error": error,
        }

    def steps(self, ids: torch.Tensor, length: int) -> list[float]:
        """Decode once more; return the milliseconds of each step."""
        clock = Clock()
        tokens = self.generate(ids, self.args.new_tokens, length, logits_processor=[clock])
        if tokens.shape[1] != ids.shape[1] + self.args.new_tokens:
            raise SystemExit(
                f"generate: tokens must be {self.args.new_tokens} more; got {tokens.shape}."
            )
        return clock.milliseconds()[1:]

    def prefill_ms(self, batch: int) -> float:
        """Median time to the first token, after one call that is checked and not timed."""
        ids = self.ids(batch, 24 if self.args.tiny else PREFILL)
        length, options = ids.shape[1] + 1, {}
        if self.setting == "backend":
            # Without it generate() calls the model as it is, not what it compiled.
            options["prefill_chunk_size"] = ids.shape[1]
        graphs = len(self.backend.blocks)
        first = self.generate(
            ids, 1, length, return_dict_in_generate=True, output_logits=True, **options
        )
        expected = logits_of(self.model, ids[:CHECKED])
        error = relative_error(first.logits[0][:CHECKED], expected)
        within("prefilled logits", error, LOGITS)
        if self.setting == "backend":
            self.backend.require(self.blocks)
            if len(self.backend.blocks) == graphs:
                raise SystemExit("generate: a prefill must have a graph; got none. Not timed.")
        times = []
        for _ in range(PREFILLS):
            clock = Clock()
            self.generate(ids, 1, length, logits_processor=[clock], **options)
            times += clock.milliseconds()
        return round(statistics.median(times), 2)


def time_one(name: str, setting: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Append the rows of one model and setting; 1 where the time did not suffice."""
    started = time.perf_counter()
    run = Run(name, setting, args)
    seconds = time.perf_counter() - started
    print(f"{name} {setting}: {run.blocks} blocks, ready in {seconds:.0f} s{run.facts}", flush=True)
    longest = 0.0
    for batch in args.batch:
        before = time.perf_counter()
        if args.minutes and before - started + longest > args.minutes * 60:
            print(f"{name} {setting}: no time for batch {batch} and what follows", flush=True)
            return 1
        rows.append(run.measure(batch))
        longest = max(longest, time.perf_counter() - before)
        print_rows(rows[-1:])
        write(args.json, rows)
    return 0


def time_apart(
    name: str, setting: str, args: argparse.Namespace, rows: list, minutes: float
) -> int:
    """Do so in a process of its own, whose memory and failure are its own; return its exit code."""
    command = [sys.executable, __file__, "--model", name, "--settings", setting]
    command += ["--batch", *map(str, args.batch), "--new-tokens", str(args.new_tokens)]
    command += ["--kernel", args.kernel, "--minutes", str(minutes)] + ["--tiny"] * args.tiny
    command += ["--layers", str(args.layers)] if args.layers else []
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        code = subprocess.run([*command, "--json", file.name]).returncode
        text = Path(file.name).read_text()
    rows += json.loads(text)["rows"] if text else []
    write(args.json, rows)
    return code


def main() -> int:
    """Print the rows; 1 where a model and setting failed or found no time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 4, 64])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="the first so many layers only")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a check on a CPU")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--minutes", type=float, default=0, help="begin no batch that ends later")
    parser.add_argument("--one-process", action="store_true", help="memory adds up; for --tiny")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.tiny:
        print("generate: needs a CUDA device; there is none, so nothing is measured. Try --tiny.")
        return 0
    pairs = list(itertools.product(args.model, args.settings))
    rows: list[dict[str, Any]] = []
    if len(pairs) == 1:
        return time_one(*pairs[0], args, rows)
    deadline = time.perf_counter() + args.minutes * 60
    failed = []
    for left, pair in zip(range(len(pairs), 0, -1), pairs, strict=True):
        share = max(deadline - time.perf_counter(), 1) / 60 / left if args.minutes else 0
        if args.one_process:
            code = time_one(*pair, args, rows)
        else:
            code = time_apart(*pair, args, rows, share)
        failed += [f"{' '.join(pair)}: not complete, exit code {code}"] * bool(code)
    print()
    print_rows(rows)
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
