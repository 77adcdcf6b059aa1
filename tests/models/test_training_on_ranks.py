"""LoRA beside packed experts on two processes: the gradients are those of one."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("peft", reason="optional package")

SCRIPT = """
    import sys
    import peft, torch
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    from tiny_models import enlarge_experts, gemma4, nemotron_h
    import fp4moe
    from fp4moe.testing import relative_error

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ids = torch.arange(1, 49).reshape(4, 12)

    def make(build):
        torch.manual_seed(0)
        model = fp4moe.replace_moe(enlarge_experts(build()), progress=False)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
        return peft.get_peft_model(model, config).train()

    def gradients(model, rows):
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        model = getattr(model, "module", model)
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}

    for build, way in (gemma4, "fsdp2"), (nemotron_h, "ddp"):
        expected = gradients(make(build), ids)
        model = make(build)
        if way == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        got = gradients(model, ids[2 * rank : 2 * rank + 2])
        assert got.keys() == expected.keys() and got
        # Two means of halves: float32 in another order.
        worst = max(float(relative_error(got[n], g)) for n, g in expected.items())
        assert worst < 1e-5, (way, worst)
    # One write a line: two processes share the pipe.
    sys.stdout.write(f"rank {rank} agrees\\n")
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "run.py")]
    support = str(pathlib.Path(__file__).parents[1] / "support")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": support}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 agrees", "rank 1 agrees"]
