"""The Triton kernels between another library's GEMMs: sorting, activation, weighted sum.

On a GPU where there is one, else in Triton's interpreter, which test_triton.py starts.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fp4moe.activations import ACTIVATIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


# The last number of slots is beyond what one kernel sorts.
@pytest.mark.parametrize(("slots", "tiles"), [(1, (8, 16)), (85, (48, 8)), (2051, (96, 128))])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slots_are_sorted_by_expert_in_whole_tiles(slots, tiles, dtype, poisoned_empty):
    from fp4moe.kernels.humming.kernel import places_of

    ids = torch.randint(-2, 12, (slots, 1), device=DEVICE, dtype=dtype)
    for place, rows in zip(places_of(ids, (3, 7), *tiles), tiles, strict=True):
        expected, experts = [], []
        for expert in range(7):
            mine = (ids.flatten() == expert + 3).nonzero().flatten().tolist()
            mine += [slots] * (-len(mine) % rows)
            expected += mine
            experts += [expert] * (len(mine) // rows)
        assert place["num_tokens_padded"].tolist() == [len(expected)]
        assert place["sorted_ids"][: len(expected)].tolist() == expected
        assert place["expert_ids"][: len(experts)].tolist() == experts


def test_equal_tiles_are_sorted_once():
    from fp4moe.kernels.humming.kernel import places_of

    first, second = places_of(torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), (0, 1), 16, 16)
    assert first is second


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_rows_are_those_of_the_table(name, gated, poisoned_empty):
    from fp4moe.kernels.triton.activation import activate_rows

    x = torch.randn(5, 2 * 1037, device=DEVICE)
    x[0, :2] = torch.tensor([torch.nan, -0.0])
    x = x.bfloat16()
    a, b = x.float().chunk(2, 1) if gated else (x.float(), torch.ones((), device=DEVICE))
    expected = ACTIVATIONS[name].function(a) * b
    got = activate_rows(x, name, gated).float()
    # One rounding to bfloat16, half of 2^-8 of the value (all of it in the interpreter, which
    # cuts), and float32 noise below.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_of_other_experts_are_not_read(top_k, poisoned_empty):
    from fp4moe.kernels.triton.sort import sum_slots

    ids = torch.tensor([[0, 4, 4], [3, 9, 3], [-1, 5, 4]], device=DEVICE)[:, :top_k].contiguous()
    rows = torch.randn(3 * top_k, 1104, device=DEVICE).bfloat16()
    inside = ((ids >= 3) & (ids < 5)).flatten()
    rows[~inside] = float("nan")
    scores = torch.rand(3, top_k, device=DEVICE)
    own = torch.where(inside[:, None], rows.float(), 0.0)[:, :1099].view(3, top_k, 1099)
    for weights, factor in ((scores, scores[..., None]), (None, 1.0)):
        out = torch.empty(3, 1099, device=DEVICE)
        assert sum_slots(rows, ids, (3, 2), out, weights) is out
        torch.testing.assert_close(out, (own * factor).sum(1), rtol=1e-6, atol=1e-6)
