"""Experts shared by processes with Gloo: one run of two, and one of four.

What each check demands stands in support/parallel_checks.py.
"""

from __future__ import annotations

import checkpoint_makers as makers
import pytest
import ranks
import torch

pytestmark = pytest.mark.slow

FAMILIES = ("gemma4", "qwen3_moe", "nemotron_h", "glm4_moe", "mixtral", "deepseek_v3")


def damage(tensors):
    """NaN in a block scale of the last expert, far from the end of the file."""
    key = next(key for key in sorted(tensors) if ".7." in key and key.endswith("weight_scale"))
    tensors[key].view(torch.uint8)[0, 0] = 0x7F


@pytest.fixture(scope="module")
def printed(checkpoint, tmp_path_factory):
    """What each of two processes prints, and each of four."""
    root = tmp_path_factory.mktemp("two")
    qwen = checkpoint("qwen3_moe")
    makers.rewrite(qwen, root / "damaged", damage)
    makers.rewrite(qwen, root / "other", lambda tensors: tensors["lm_head.weight"].neg_())
    packed = root / "packed"
    try:
        makers.save_modelopt("gemma4", packed)
    except pytest.skip.Exception:
        packed = None
    small = checkpoint("qwen3_moe", moe_intermediate_size=16)
    formats = [checkpoint("qwen3_moe", form) for form in ("fp8", "mxfp4")]
    checks = {
        "equal": {"names": {name: checkpoint(name) for name in FAMILIES}},
        "forms": {
            "directory": checkpoint("mixtral"),
            "uneven": checkpoint("gemma4", None, moe_intermediate_size=48),
            "formats": formats,
            "packed": packed,
        },
        "replaced": {"names": [checkpoint(name, None) for name in FAMILIES[::2]]},
        "own_batch": {
            "names": {name: checkpoint(name) for name in ("gemma4", "qwen3_moe")},
            "way": "own",
        },
        "refusals": {
            "directory": qwen,
            "other": root / "other",
            "damaged": root / "damaged",
            "small": small,
        },
        "killed": {"directory": qwen},
    }
    four = {"own_batch": {"names": {"qwen3_moe": qwen}, "way": "own4"}}
    return ranks.run([(2, checks), (4, four)], root)


@pytest.mark.parametrize("check", ["equal", "forms", "replaced", "own_batch", "refusals"])
def test_two_processes(check, printed):
    for text in printed[0]:
        assert f"{check} passed" in text, text[-4000:]


def test_the_end_of_one_process_ends_the_others(printed):
    assert "after the other has ended: RuntimeError" in printed[0][0], printed[0][0][-4000:]


def test_four_processes_of_which_two_share_a_batch(printed):
    for text in printed[1]:
        assert "own_batch passed" in text, text[-4000:]
