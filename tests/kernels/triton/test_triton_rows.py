"""The Triton kernels between another library's GEMMs: sorting, activation, weighted sum.

On a GPU where there is one, else in Triton's interpreter, which test_triton.py starts.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fp4moe.activations import ACTIVATIONS, get_activation

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


TEXTS = (
    "silu(alpha=1.702,beta=1,limit=1)",
    "gelu(beta=-0.5,limit=0.5)",
    "silu_step(limit=0.5)",
    "silu_softcap(alpha=2,beta=1.5)",
    "silu(alpha=1.702)",
    "relu2",
)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_parameters_and_biases_of_rows(text, dtype, biased, poisoned_empty):
    from fp4moe.kernels.triton.activation import activate_rows

    gated = text not in TEXTS[4:]
    x = torch.randn(6, 1037 * (1 + gated), device=DEVICE)
    x[0, -1], x[0, 0], x[4, 0], x[5, :9] = torch.nan, torch.inf, torch.nan, 1e-4
    x = x.to(dtype)
    # Experts 3 and 4 are here.
    ids = torch.tensor([[3, 4], [2, 4], [5, 3]], device=DEVICE, dtype=torch.int32)
    bias = torch.randn(2, x.shape[1], device=DEVICE) if biased else None
    got = activate_rows(x, text, gated, ids, (3, 2), bias).float()
    here = ids.flatten() - 3
    inside = (here >= 0) & (here < 2)
    values = x.float() if bias is None else x.float() + bias[here.clamp(0, 1)]
    gate, up = values.chunk(2, 1) if gated else (None, values)
    expected = get_activation(text).combine(up, gate)
    # One rounding to bfloat16, as above. In float32 a sigmoid is right to some 2^-21, and a tanh to
    # three bits less at 1/8.
    rtol = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-17
    expected, got = expected[inside], got[inside]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_of_other_experts_are_not_read(top_k, poisoned_empty):
    from fp4moe.kernels.triton.sort import sum_slots

    ids = torch.tensor([[0, 4, 4], [3, 9, 3], [-1, 5, 4]], device=DEVICE)[:, :top_k].contiguous()
    rows = torch.randn(3 * top_k, 1104, device=DEVICE).bfloat16()
    inside = ((ids >= 3) & (ids < 5)).flatten()
    rows[~inside] = float("nan")
    scores = torch.rand(3, top_k, device=DEVICE)
    # Longer than the sum, and than the rows, as padded biases may be.
    bias = torch.randn(2, 1152, device=DEVICE)
    biases = bias[(ids.flatten() - 3).clamp(0, 1), :1104]
    for weights, factor, added in (
        (scores, scores[..., None], None),
        (scores, scores[..., None], bias),
        (None, 1.0, None),
    ):
        total = rows.float() if added is None else rows.float() + biases
        own = torch.where(inside[:, None], total, 0.0)[:, :1099].view(3, top_k, 1099)
        out = torch.empty(3, 1099, device=DEVICE)
        assert sum_slots(rows, ids, (3, 2), out, weights, added) is out
        torch.testing.assert_close(out, (own * factor).sum(1), rtol=1e-6, atol=1e-6)
