"""The formulas are the functions that they are named after, and what fp4moe computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fp4moe.formats import NVFP4
from fp4moe.kernels.flashinfer.rows import gate_up_row_index

from . import formulas
from .values import E2M1, E4M3, nearest

F = np.float32
UNIT = 2.0**-24
X = np.linspace(-10, 10, 40001).astype(F)


def test_gelu_is_the_tanh_form_and_not_the_other() -> None:
    got = torch.from_numpy(X * formulas.phi_gelu_tanh(X, F(1)))
    exact = torch.from_numpy(X).double()
    tanh, erf = (torch.nn.functional.gelu(exact, approximate=form) for form in ("tanh", "none"))
    # Seven roundings before tanh, whose slope times argument is below 0.45; three after it.
    assert ((got - tanh).abs() <= 7 * UNIT * exact.abs()).all()
    assert 4.5e-4 < (got - erf).abs().max() < 4.8e-4


def test_sigmoid() -> None:
    got = torch.from_numpy(formulas.phi_sigmoid(X, F(1)))
    # Three roundings of the power's argument, times u * sigmoid'(u) <= 0.23; three more after it.
    assert ((got - torch.from_numpy(X).double().sigmoid()).abs() <= 4 * UNIT).all()


def test_limits_and_units() -> None:
    """Raw accumulators 3 in units of 0.5 are 1.5; the limit 2 is 1 and beta 4 is 2."""
    given = {"scale_gate": 0.5, "alpha": 1.0, "beta": 4.0, "limit": 2.0}
    up, gate = np.array([[3, 3, -3, 1]], F), np.array([[3, -3, 3, 1]], F)
    got = formulas.gated("swiGlu", up, gate, given)
    # (up + beta) * 0.5 * gate * sigmoid(0.5 * gate); 0.5 * (2 + 4) = 3 and so on.
    want = [3 * 2 / (1 + math.exp(-1)), 3 * -3 / (1 + math.exp(1.5)), 1 * 2 / (1 + math.exp(-1))]
    assert got[0, :3].tolist() == pytest.approx(want, rel=1e-6)
    assert got[0, 3] == pytest.approx(2.5 / (1 + math.exp(-0.5)), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-4, 2.0**-9, 1.9])
def test_the_quantiser_of_the_reference(scale: float) -> None:
    """fp4moe's reference rounds the intermediate to the same bits, given the same reciprocal."""
    x = torch.randn(64, 16) * torch.exp2(torch.linspace(-12, 12, 64)).unsqueeze(1)
    x[5] = 0
    with np.errstate(divide="ignore"):
        outputs, wanted = formulas.nvfp4(x.T.numpy(), float(F(1) / F(scale)))
    block_scale = E4M3[nearest(wanted, E4M3)].astype(F)
    element = np.copysign(E2M1[nearest(outputs, E2M1)], outputs).astype(F)
    got = torch.from_numpy((element * (block_scale * F(scale))).T)
    assert torch.equal(got, NVFP4.round_intermediate(x, torch.tensor(scale)))
    assert block_scale.min() == 0 and block_scale.max() == 448  # both ends are among them


@pytest.mark.parametrize("gated", [True, False])
def test_rows_are_where_fp4moe_puts_them(gated: bool) -> None:
    """The pairing that the kernels have is that of the prepared weights."""
    intermediate = 128
    index = gate_up_row_index(intermediate * (1 + gated), gated)
    names = [f"{part}[{f}]" for part in ("gate", "up")[not gated :] for f in range(intermediate)]
    for block in range(len(index) // 32):
        for i in range(8):
            rows = [names[index[32 * block + i + 8 * k]] for k in range(4)]
            if gated:
                f = 16 * block + 2 * i
                assert rows == [f"up[{f}]", f"gate[{f}]", f"up[{f + 1}]", f"gate[{f + 1}]"]
            else:
                assert rows == [f"up[{32 * block + 4 * i + k}]" for k in range(4)]


def test_a_block_of_mxfp8_on_paper() -> None:
    # 1.9 = 2^0 * 1.9: the scale is 2^-8, 1.9 becomes 486.4, above 448, so that 1.75 is stored.
    outputs, scale = formulas.mxfp8(np.array([[1.9], [-0.3]], F), 0.0)
    assert scale.tolist() == [2.0**-8] and outputs[:, 0].tolist() == [F(1.9) * 256, F(-0.3) * 256]
    # Another warp found 7: 2^2 * 1.75.
    assert formulas.mxfp8(np.array([[1.9]], F), 7.0)[1].tolist() == [2.0**-6]
    assert formulas.mxfp8(np.zeros((2, 1), F), 0.0)[1].tolist() == [0.0]
