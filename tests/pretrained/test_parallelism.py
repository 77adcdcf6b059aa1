"""transformers' tensor and expert parallelism: refused before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings

import checkpoint_makers as makers
import pytest
import transformers
from transformers.distributed import DistributedConfig

import fp4moe
from fp4moe.errors import UnsupportedError


def expert_parallel():
    with warnings.catch_warnings():
        # The flag of transformers up to 5.21, and what it means since.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedConfig(tp_size=2, enable_expert_parallel=True)


ASKED = {
    "tensor": (lambda: {"distributed_config": DistributedConfig(tp_size=2)}, "tp_size=2"),
    "expert": (lambda: {"distributed_config": expert_parallel()}, "enable_expert_parallel=True"),
    "tp_size": (lambda: {"tp_size": 2}, "tp_size=2"),
    "tp_plan": (lambda: {"tp_plan": "auto"}, "tp_plan=auto"),
}


@pytest.mark.parametrize("version", ["5.17.0", "5.22.1", "5.23.0", "6.0.0.dev0"])
@pytest.mark.parametrize("how", ASKED)
def test_it_is_refused_before_a_file_is_opened(how, version, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", version)
    make, given = ASKED[how]
    # The directory does not exist: nothing has looked at it.
    with pytest.raises(UnsupportedError) as raised:
        fp4moe.from_pretrained(str(tmp_path / "nowhere"), **make())
    text = str(raised.value)
    assert text.startswith("from_pretrained: the model cannot be loaded with ")
    older = version < "5.23"
    assert ("transformers older than 5.23 does not add up" in text) == older
    assert (f"and this is {version}" in text) == older
    assert given in text and text.endswith("or pass device_map to use several GPUs.")


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_one_rank_asks_for_nothing(name, tmp_path):
    makers.save_float(name, tmp_path)
    config = DistributedConfig(tp_size=1)
    model = fp4moe.from_pretrained(tmp_path, progress=False, distributed_config=config)
    assert any(isinstance(module, fp4moe.FusedExperts) for module in model.modules())


SHARDED = """
    import sys
    import fp4moe, transformers
    from transformers.distributed import DistributedConfig
    fp4moe.register_transformers()
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        load(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
    except fp4moe.errors.UnsupportedError as error:
        # One write a line: two processes share the pipe.
        sys.stdout.write(f"{error}\\n")
"""


@pytest.mark.slow
def test_two_processes_through_transformers_own_loader(tmp_path):
    makers.save_modelopt("qwen3_moe", tmp_path)
    (tmp_path / "run.py").write_text(textwrap.dedent(SHARDED))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "run.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from_pretrained: the model cannot be loaded with ") == 2
