"""A model whose experts two processes share, on a CPU: its results and bytes against one process.

    python examples/two_processes.py

A small Qwen3-MoE is written, its experts quantised, and then loaded in three ways: transformers'
tensor parallelism (each process holds a part of every expert), its expert parallelism (each holds
half of the experts), and one batch for each process (`fp4moe.split_experts`). The first two need
transformers 5.23. On a machine with a GPU for each process, start the same calls with torchrun and
leave CUDA_VISIBLE_DEVICES alone.
"""

from __future__ import annotations

import os
import pathlib
import socket
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging as transformers_logging

import fp4moe
from fp4moe.models.sharding import is_supported
from fp4moe.report import format_bytes, format_table

PROCESSES = 2
# Of logits below 1: sums in another order.
LIMIT = 1e-6


def write(folder: pathlib.Path) -> None:
    """Write a random model of bfloat16, and the same with NVFP4 experts."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "bfloat16")
    fp4moe.quantize_checkpoint(folder / "bfloat16", folder / "nvfp4", progress=False)


def ways() -> dict[str, dict[str, int] | None]:
    """Name -> sizes for transformers; None: fp4moe.split_experts."""
    split = {
        "tensor parallel": {"tp_size": PROCESSES},
        "expert parallel": {"tp_size": PROCESSES, "ep_size": PROCESSES},
    }
    supported = is_supported(transformers.__version__)
    return (split if supported else {}) | {"a batch for each": None}


def load(folder: str, sizes: dict[str, int] | None) -> torch.nn.Module:
    """Load the model with its experts shared."""
    options = {"dtype": torch.float32, "progress": False}
    if sizes is not None:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**sizes)
        return fp4moe.from_pretrained(folder, **options)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    return fp4moe.split_experts(fp4moe.from_pretrained(folder, **options), mesh)


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of the experts that are here."""
    return sum(m.nbytes for m in model.modules() if isinstance(m, fp4moe.FusedExperts))


def process(rank: int, temporary: str, port: int) -> None:
    """Be one of the processes."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = os.path.join(temporary, "nvfp4")
    if rank == 0:
        write(pathlib.Path(temporary))
    dist.barrier()
    prompts = torch.arange(1, 1 + PROCESSES * 2 * 8).reshape(PROCESSES, 2, 8)
    whole = fp4moe.from_pretrained(folder, dtype=torch.float32, progress=False)
    rows = [["one process", "", "", format_bytes(nbytes(whole))]]
    for name, sizes in ways().items():
        # The processes share a batch, or have one each.
        ids = prompts[rank if sizes is None else 0]
        model = load(folder, sizes)
        with torch.no_grad():
            error = (model(ids).logits - whole(ids).logits).abs().max()
            tokens, expected = (
                m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, whole)
            )
        same = torch.tensor(float(torch.equal(tokens, expected)))
        dist.all_reduce(error, dist.ReduceOp.MAX)
        dist.all_reduce(same, dist.ReduceOp.MIN)
        words = "equal" if same else "others"
        rows.append([name, f"{float(error):.1e}", words, format_bytes(nbytes(model))])
        if float(error) > LIMIT or not same:
            sys.exit(f"{name}: wrong results, {rows[-1]}")
        if rank == 0 and sizes is not None:
            print(fp4moe.explain(model), end="\n\n")
    if rank == 0:
        header = ["experts", "largest difference of logits", "tokens", "bytes of a process"]
        print(format_table(header, rows))
        print(f"\nAll ways agree with one process within {LIMIT:g}.", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the processes."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forks: everything is imported already, and nothing has been computed.
        mp.start_processes(process, (folder, port), PROCESSES, start_method="fork")


if __name__ == "__main__":
    main()
