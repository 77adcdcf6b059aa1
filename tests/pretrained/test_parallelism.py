"""transformers' tensor and expert parallelism: what is refused before anything is loaded."""

from __future__ import annotations

import warnings

import checkpoint_makers as makers
import pytest
import transformers
from transformers.distributed import DistributedConfig

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError


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


@pytest.mark.parametrize("version", ["5.17.0", "5.22.1"])
@pytest.mark.parametrize("how", ASKED)
def test_older_versions_are_refused_before_a_file_is_opened(how, version, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", version)
    make, given = ASKED[how]
    # The directory does not exist: nothing has looked at it.
    with pytest.raises(UnsupportedError) as raised:
        fp4moe.from_pretrained(str(tmp_path / "nowhere"), **make())
    text = str(raised.value)
    assert text.startswith("from_pretrained: the model cannot be loaded with ")
    assert "transformers older than 5.23 does not add up" in text
    assert f"and this is {version}" in text
    assert given in text and text.endswith("Load without it, or pass device_map.")


@pytest.mark.parametrize("how", ["tensor", "expert", "tp_size"])
def test_other_numbers_of_processes_are_named(how, monkeypatch, tmp_path):
    """Of one process alone; tests/parallel has several."""
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    with pytest.raises(ShapeError, match=r"tp_size must be the number of processes, 1; got 2\."):
        fp4moe.from_pretrained(str(tmp_path / "nowhere"), **ASKED[how][0]())


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_one_rank_asks_for_nothing(name, tmp_path):
    makers.save_float(name, tmp_path)
    config = DistributedConfig(tp_size=1)
    model = fp4moe.from_pretrained(tmp_path, progress=False, distributed_config=config)
    assert any(isinstance(module, fp4moe.FusedExperts) for module in model.modules())
