"""What the TRT-LLM-Gen kernels of flashinfer-cubin 0.6.13 compute after their first GEMM.

Each kernel is disassembled; a simulated warp runs the float instructions from the accumulators in
tensor memory to the last conversion. Outputs and block scales, before they are rounded, must equal
those of `formulas` in every bit, under five settings of the parameters. The formulas say:

* GeGLU has the tanh form of GELU, SwiGLU the sigmoid: scale_gate * (up + beta) * gate * phi(alpha *
  scale_gate * gate), in this order (scale_gate * up + scale_gate * beta is one FFMA); relu2 is
  relu(scale_act * x)^2. Then comes the factor scale_c.
* A bias is added to the accumulators (FP8 per tensor: a scale per token multiplies them), before
  the limit, which holds for gate from above and for up on both sides. Bias, beta and limit are in
  the units of the accumulators.
* NVFP4: block scale = e4m3((amax * scale_c) * fl32(1/6)), element = e2m1((V * (1 / block scale)) *
  scale_c), with 0 for the reciprocal of 0. FP8: e4m3(V * scale_c). MXFP8: no factor at all; block
  scale = 2^(floor(log2(amax)) - 8), element = e4m3(V / block scale), saturated.
* Rows i, i + 8, i + 16, i + 24 of 32 are up[f], gate[f], up[f + 1], gate[f + 1], f = 2 i; without a
  gate features 4 i to 4 i + 3. amax ignores NaN, and relu2 makes 0 of it.

Only the path on which every optional pointer is given is run; the sums of split-K kernels before it
are not, nor is the bias of the kernels in `bias_is_not_followed`. Left out: two E4m3 relu2 kernels
without a scale per token and two NVFP4 ones without an activation, all of static batches, and the
kernels with 16-bit outputs, of which test_second_gemm.py runs NVFP4's second GEMMs.
"""

from __future__ import annotations

import functools

import pytest

from .cubins import disassemble, kernel_names
from .epilogue import FAMILIES, SETTINGS, Family, Findings, examine

# The tests of a family share what one process found.
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=pytest.mark.xdist_group(name))
        for family in FAMILIES
        for name in [f"{family.types}-{family.activation}"]
    ],
)


@functools.cache
def examined(family: Family) -> dict[str, Findings]:
    """Return what was found, by file name."""
    names = kernel_names(family.types, family.activation)
    return {name: examine(disassemble(name), family) for name in names}


def bias_is_not_followed(name: str) -> bool:
    """Tell whether the path leaves out the bias: two kernels of each activation of MXFP8."""
    return "_biasBfloat16Mn_" in name and "_tmOv_" in name


@every_family
def test_every_kernel_is_found_and_reads_the_parameters(family: Family) -> None:
    found = examined(family)
    assert len(found) == family.count
    others = [name for name, each in found.items() if each.parameters != family.parameters]
    assert others == []


@every_family
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_bit_equals_the_formula(family: Family, setting: str) -> None:
    found = examined(family)
    unread = [name for name in found if setting == "shared" and bias_is_not_followed(name)]
    assert [name for name, each in found.items() if setting in each.wrong] == unread


@every_family
def test_block_scales_underflow_and_saturate(family: Family) -> None:
    """The samples reach both ends, so that equal bits mean something there."""
    ranges = {each.block_scales for each in examined(family).values()}
    if family.block_scale is None:
        assert ranges == {None}
    else:
        assert all(least == 0.0 and largest > 448.0 for least, largest in ranges)
