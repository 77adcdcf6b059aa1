"""What the second GEMM of NVFP4 experts does in flashinfer-cubin 0.6.13: where its bias is added.

Run as in test_epilogues.py: what is converted to bfloat16 must equal (accumulator + bias) * scale_c
in every bit. So the bias is in the units of the accumulators and comes before the rounding. And by
the manifest of the wheel, every NVFP4 kernel of either GEMM has a bias, float32, one a row.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter

import numpy as np
import pytest

from .cubins import disassemble, kernel_names, wheel_path
from .listing import Listing
from .warp import Warp

SCALE_C = 0.37


def second_gemms() -> list[str]:
    """Return the kernels without an activation; others are first GEMMs, quantised apart."""
    names = kernel_names("Bfloat16_E2m1E2m1_Fp32_Ab16_Bb16", "dynB")
    return [name for name in names if not re.search("swiGlu|geGlu|relu2", name)]


def bits(values: list[np.ndarray]) -> Counter[bytes]:
    shaped = (np.broadcast_to(value, (32, 24)).astype(np.float32) for value in values)
    return Counter(value.tobytes() for value in shaped)


def differs(text: str, bias: float) -> bool:
    """Whether any bfloat16 of a kernel is of another float than the formula says."""
    listing = Listing(text)
    path = listing.path_to(listing.conversions("BF16")[-1])
    warp = Warp({"scale_c": SCALE_C}, samples=24, shared=bias).run(path)
    converted = [v for kind, *pair in warp.conversions if kind == "BF16" for v in pair]
    assert warp.used == {"scale_c"} and converted
    if any(value.bits is None for value in converted):
        return True
    fetched = [register for _, _, registers in warp.accumulators for register in registers]
    wanted = [(x + np.float32(bias)) * np.float32(SCALE_C) for x in fetched]
    return bits([value.floats for value in converted]) != bits(wanted)


def test_every_second_gemm_adds_its_bias_before_it_rounds() -> None:
    names = second_gemms()
    assert len(names) == 56
    assert [name for name in names if differs(disassemble(name), 0.25)] == []


@pytest.mark.parametrize("old, new", [("FADD", "FMUL"), ("FMUL", "FADD")])
def test_a_planted_change_is_noticed(old: str, new: str) -> None:
    text, count = re.subn(rf"\b{old}", new, disassemble(second_gemms()[0]))
    assert count and differs(text, 0.25)


def test_every_kernel_of_the_manifest_has_a_bias() -> None:
    with zipfile.ZipFile(wheel_path()) as wheel:
        (name,) = (n for n in wheel.namelist() if re.search("batched_gemm.*MetaInfo", n))
        rows = wheel.read(name).decode().split("\n{nullptr")[1:]
    found = [row for row in rows if re.search(r'"bmm_(E2m1|Bfloat16)_E2m1E2m1_', row)]
    assert len(found) == 332
    for row in found:
        fields = dict(re.findall(r"/\* (m\w+) \*/ (.*)", row))
        # BiasType 1 is M; the dtype is that of the accumulators, float32.
        assert fields["mBiasType"] == "gemm::BiasType(1)"
        assert fields["mBiasDtype"] == fields["mDtypeAcc"]
        assert fields["mClampBeforeAct"] == "1"
