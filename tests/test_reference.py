"""The definition of the operator, against numbers on paper, second formulations and transformers.

Everything in float64 or bit for bit; tolerances are bounds on float32 rounding, worked out beside
the result.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Gemma4TextConfig, MixtralConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.formats import NVFP4
from fp4moe.formats.four_bits import pack_codes
from fp4moe.formats.nvfp4 import NVFP4Values, dequantize_nvfp4
from fp4moe.reference import moe_definition, reference, reference_w4a4, sum_over_experts

UNIT = 2.0**-24  # relative error of one float32 rounding
GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

# Each activation a second time, in float64, with a bound on its slope at a.
FORMULAS = {
    "silu": (lambda a: a / (1 + torch.exp(-a)), lambda a: 1.1),
    "gelu_tanh": (
        lambda a: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        lambda a: 1.13,
    ),
    "gelu": (lambda a: 0.5 * a * (1 + torch.erf(a / math.sqrt(2))), lambda a: 1.13),
    "relu2": (lambda a: a.clamp(min=0) ** 2, lambda a: 2 * a.abs() + 1),
    "relu": (lambda a: a.clamp(min=0), lambda a: 1.0),
    "identity": (lambda a: a, lambda a: 1.0),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_form = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def combine_matrix(ids, weights, local, offset, first=0.0):
    """[T, L] float64: the summed weight that a token gives each local expert."""
    one_hot = ids.long().unsqueeze(-1) == torch.arange(local) + offset
    return torch.einsum("tk,tke->te", weights.double(), one_hot.double())


def dense(x, ids, weights, up, down, gate=None, *, activation, offset=0):
    """Every expert on every token in float64: ([T, H] result, [T, H] bound on a float32 error).

    The bound follows the usual n * u per dot product of length n through each step.
    """
    f, slope = FORMULAS[activation]
    x, up, down = x.double(), up.double(), down.double()
    gate = None if gate is None else gate.double()

    def product(w):
        n = x.shape[1] + 1
        return (
            torch.einsum("th,eih->tei", x, w),
            n * UNIT * torch.einsum("th,eih->tei", x.abs(), w.abs()),
        )

    a, a_error = product(up if gate is None else gate)
    h, h_error = f(a), slope(a) * a_error + 8 * UNIT * torch.maximum(f(a).abs(), a.abs())
    if gate is not None:
        u, u_error = product(up)
        h, h_error = h * u, h_error * u.abs() + (h.abs() + h_error) * (u_error + UNIT * u.abs())
    y = torch.einsum("tei,ehi->teh", h, down)
    steps = (h.shape[2] + ids.shape[1] + 2) * UNIT
    y_error = torch.einsum("tei,ehi->teh", h_error + steps * h.abs(), down.abs())
    local = up.shape[0]
    combine = combine_matrix(ids, weights, local, offset)
    absolute = combine_matrix(ids, weights.abs(), local, offset)
    return (
        torch.einsum("te,teh->th", combine, y),
        torch.einsum("te,teh->th", absolute, 1.01 * y_error),
    )


def assert_within(got, want, bound):
    """|got - want| <= bound, plus one rounding to the dtype of got."""
    bound = bound + torch.finfo(got.dtype).eps / 2 * (want.abs() + bound)
    excess = (got.double() - want).abs() - bound
    assert (excess <= 0).all(), f"off by {excess.max():.2e} beyond the bound"


def float_weights(local, intermediate, hidden, gated):
    def scaled(*shape):
        return torch.randn(shape) / shape[-1] ** 0.5

    named = {"up": scaled(local, intermediate, hidden), "down": scaled(local, hidden, intermediate)}
    return named | ({"gate": scaled(local, intermediate, hidden)} if gated else {})


# Two experts, two tokens, on paper.

X = [[1.0, 2.0], [-1.0, 3.0]]
GATE = [[[1.0, 0.0]], [[1.0, 1.0]]]
UP = [[[0.0, 1.0]], [[1.0, -1.0]]]
DOWN = [[[1.0], [2.0]], [[3.0], [-1.0]]]
IDS = [[0, 1], [1, 0]]
ROUTING = [[0.5, 0.25], [0.5, 1.0]]
# gated relu: token 0: expert 0 1 * 2 -> (2, 4), expert 1 3 * -1 -> (-9, 3)
#             token 1: expert 1 2 * -4 -> (-24, 8), expert 0 relu(-1) = 0
# gated identity: as above, but expert 0 gives token 1 -1 * 3 -> (-3, -6)
# plain relu2: token 0: expert 0 2^2 -> (4, 8), expert 1 relu(-1) = 0
#              token 1: expert 1 relu(-4) = 0, expert 0 3^2 -> (9, 18)
# plain identity: token 0: (2, 4) and -1 -> (-3, 1); token 1: -4 -> (-12, 4) and 3 -> (3, 6)
ON_PAPER = {
    ("relu", True): [[-1.25, 2.75], [-12.0, 4.0]],
    ("identity", True): [[-1.25, 2.75], [-15.0, -2.0]],
    ("relu2", False): [[2.0, 4.0], [9.0, 18.0]],
    ("identity", False): [[0.25, 2.25], [-3.0, 8.0]],
}


def on_grid(values):
    """NVFP4Values of numbers that E2M1 has, all scales 1, zero-padded to blocks of 16."""
    x = torch.tensor(values) if isinstance(values, list) else values
    codes = torch.tensor([GRID.index(abs(v)) + 8 * (v < 0) for v in x.flatten().tolist()])
    codes = torch.nn.functional.pad(codes.view(x.shape).byte(), (0, -x.shape[-1] % 16))
    ones = torch.ones(*codes.shape[:-1], codes.shape[-1] // 16).to(torch.float8_e4m3fn)
    return NVFP4Values(pack_codes(codes), ones, torch.ones(x.shape[0]))


def grid_weights(up, down, gate=None, **fields):
    """ExpertWeights that hold these numbers exactly."""
    up, down = (torch.nn.functional.pad(w, (0, 0, 0, -w.shape[1] % 16)) for w in (up, down))
    if gate is not None:
        gate = torch.nn.functional.pad(gate, (0, 0, 0, -gate.shape[1] % 16))
    local = up.shape[0]
    defaults = {
        "num_experts": local,
        "expert_offset": 0,
        "hidden_scale": torch.ones(1),
        "intermediate_scale": torch.ones(local),
    }
    return ExpertWeights(
        gate_up=on_grid(up if gate is None else torch.cat((gate, up), 1)),
        down=on_grid(down),
        gated=gate is not None,
        **{**defaults, **fields},
    )


@pytest.mark.parametrize("activation, gated", ON_PAPER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_experts_and_two_tokens_on_paper(activation, gated, dtype):
    x, ids, routing = torch.tensor(X, dtype=dtype), torch.tensor(IDS), torch.tensor(ROUTING)
    up, down, gate = torch.tensor(UP), torch.tensor(DOWN), torch.tensor(GATE) if gated else None
    got = moe_definition(x, ids, routing, up=up, down=down, gate=gate, activation=activation)
    assert got.dtype == dtype and got.tolist() == ON_PAPER[activation, gated]
    weights = grid_weights(
        up, down, gate, activation=activation, hidden_size=2, intermediate_size=1
    )
    assert reference(x, weights, ids, routing).tolist() == ON_PAPER[activation, gated]


# The dense second formulation.


@every_activation
@every_form
@pytest.mark.parametrize("offset", [0, 3])
def test_definition_is_the_dense_sum(activation, gated, offset):
    tokens, local, top_k = 41, 5, 4
    weights = float_weights(local, 24, 40, gated)
    x, routing = torch.randn(tokens, 40), torch.randn(tokens, top_k)
    # From below -1 to beyond the last expert, and duplicates in some rows.
    ids = torch.randint(-3, offset + local + 3, (tokens, top_k))
    ids[0] = torch.tensor([-1, offset + local, 2**31 - 1, offset - 1])
    ids[1] = offset + 2
    ids[2] = torch.tensor([offset, offset + 1, offset, offset])
    want, bound = dense(x, ids, routing, **weights, activation=activation, offset=offset)
    kwargs = {"activation": activation, "expert_offset": offset}
    got = moe_definition(x, ids, routing, **weights, **kwargs)
    assert_within(got, want, bound)
    assert got[0].eq(0).all() and got[1].ne(0).any()
    assert torch.equal(moe_definition(x, ids.int(), routing, **weights, **kwargs), got)
    for dtype in (torch.bfloat16, torch.float16):
        low, low_routing = x.to(dtype), routing.to(dtype)
        want, bound = dense(low, ids, low_routing, **weights, activation=activation, offset=offset)
        assert_within(moe_definition(low, ids, low_routing, **weights, **kwargs), want, bound)


def test_the_bound_is_tight_enough_to_see_a_mistake():
    weights = float_weights(4, 24, 40, True)
    x, ids, routing = torch.randn(9, 40), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    want, bound = dense(x, ids, routing, **weights, activation="gelu")
    assert (bound.mean() / want.abs().mean()) < 3e-4
    other, _ = dense(x, ids, routing, **weights, activation="gelu_tanh")
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within(other.float(), want, bound)


@pytest.mark.parametrize("ids", [[], [[-1, 4], [99, -7]]], ids=["no token", "no local id"])
def test_nothing_to_do_gives_zeros(ids):
    ids = torch.tensor(ids, dtype=torch.int64).view(-1, 2)
    x = torch.randn(len(ids), 40, dtype=torch.bfloat16)
    got = moe_definition(
        x, ids, torch.rand(ids.shape), **float_weights(4, 24, 40, True), activation="silu"
    )
    assert torch.equal(got, torch.zeros_like(x))


def test_weights_are_used_as_given():
    """Neither normalised nor clipped: negative, above one, and zero times infinity."""
    weights = float_weights(3, 16, 16, True)
    x, ids = torch.randn(2, 16), torch.tensor([[0, 1], [2, 2]])
    routing = torch.tensor([[-3.0, 50.0], [1.0, -1.0]])
    want, bound = dense(x, ids, routing, **weights, activation="silu")
    got = moe_definition(x, ids, routing, **weights, activation="silu")
    assert_within(got, want, bound)
    weights["down"][1] = math.inf
    got = moe_definition(x, ids, routing * torch.tensor([1.0, 0.0]), **weights, activation="silu")
    assert got[0].isnan().all() and got[1].isfinite().all()


def test_the_branch_without_host_synchronisation():
    """What runs everywhere but on a CPU, with ids that claim to be elsewhere."""

    class Elsewhere:
        """Expert ids that report another device; comparisons give plain tensors."""

        def __init__(self, ids):
            self.ids, self.device, self.shape = ids, torch.device("meta"), ids.shape

        def __eq__(self, other):
            return self.ids == other

        __hash__ = None

    experts = torch.randn(4, 16, 16)
    x = torch.randn(7, 16)
    ids, routing = torch.randint(-1, 6, (7, 3)), torch.randn(7, 3)
    ids[0] = 3
    routing[0] = torch.tensor([1.0, -1.0, 0.0])
    experts[2] = math.inf

    def apply(expert, token):
        return x[token] @ experts[expert].T

    results = [sum_over_experts(i, routing, 1, 4, apply) for i in (ids, Elsewhere(ids))]
    # Expert 3 is infinite: the same tokens see it, even one whose weights sum to zero.
    assert [r.isfinite().all(1).tolist() for r in results] == [
        [i.eq(3).any().logical_not().item() for i in ids]
    ] * 2
    finite = results[0].isfinite()
    assert finite.any() and not finite.all()
    torch.testing.assert_close(results[1][finite], results[0][finite], rtol=1e-5, atol=1e-5)


# The real modules of transformers.

SIZES = {"hidden_size": 48, "moe_intermediate_size": 40}
TRANSFORMERS = {
    "gemma4": (Gemma4TextExperts, Gemma4TextConfig(**SIZES, num_experts=6), "gelu_tanh"),
    "nemotron_h": (
        NemotronHExperts,
        NemotronHConfig(**SIZES, n_routed_experts=6, layers_block_type=["moe"]),
        "relu2",
    ),
    "qwen3_moe": (Qwen3MoeExperts, Qwen3MoeConfig(**SIZES, num_experts=6), "silu"),
    "mixtral": (
        MixtralExperts,
        MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=6),
        "silu",
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_experts(name, implementation):
    experts_class, config, activation = TRANSFORMERS[name]
    config._experts_implementation = implementation
    module = experts_class(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if name == "nemotron_h":
        weights = {"up": module.up_proj}
    else:
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        weights = {"gate": gate, "up": up}
    weights = {k: v.detach() for k, v in (weights | {"down": module.down_proj}).items()}
    x, routing = torch.randn(33, 48), torch.rand(33, 3)
    ids = torch.rand(33, 6).argsort(1)[:, :3]
    with torch.no_grad():
        theirs = module(x, ids, routing)
    ours = moe_definition(x, ids, routing, **weights, activation=activation)
    want, bound = dense(x, ids, routing, **weights, activation=activation)
    assert_within(ours, want, bound)
    assert_within(theirs, want, bound)


# Quantised weights, activations as they are.


def quantized(local=4, intermediate=40, hidden=56, gated=True, activation="silu", **kwargs):
    named = float_weights(local, intermediate, hidden, gated)
    return ExpertWeights.quantize(**named, activation=activation, **kwargs)


@every_activation
@every_form
def test_reference_is_the_definition_of_dequantised_weights(activation, gated):
    weights = quantized(gated=gated, activation=activation, num_experts=9, expert_offset=3)
    x, ids, routing = torch.randn(19, 56), torch.randint(0, 9, (19, 3)), torch.rand(19, 3)
    got = reference(x, weights, ids, routing)
    rows = dequantize_nvfp4(weights.gate_up)[..., :56].unflatten(1, (1 + gated, -1))[:, :, :40]
    named = {"up": rows[:, -1], "down": dequantize_nvfp4(weights.down)[:, :56, :40]}
    if gated:
        named["gate"] = rows[:, 0]
    want, bound = dense(x, ids, routing, **named, activation=activation, offset=3)
    assert_within(got, want, bound)
    exact = moe_definition(x, ids, routing, **named, activation=activation, expert_offset=3)
    assert torch.equal(got, exact)


@pytest.mark.parametrize("compute", [reference, reference_w4a4])
def test_an_ambient_autocast_changes_nothing(compute):
    weights = quantized()
    x, ids, routing = torch.randn(8, 56), torch.randint(0, 4, (8, 2)), torch.rand(8, 2)
    want = compute(x, weights, ids, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compute(x, weights, ids, routing)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_error_messages():
    weights = quantized()
    x, ids, routing = torch.randn(8, 56), torch.randint(0, 4, (8, 2)), torch.rand(8, 2)
    for bad in ((x[None], ids, routing), (x, ids, routing[:, :1]), (x, ids[:7], routing[:7])):
        with pytest.raises(ShapeError) as error:
            reference(bad[0], weights, *bad[1:])
        assert str(error.value) == (
            "reference: hidden, expert_ids and routing_weights must be [T, H], [T, K] and [T, K]; "
            f"got {list(bad[0].shape)}, {list(bad[1].shape)} and {list(bad[2].shape)}. "
            "Flatten the tokens."
        )
    with pytest.raises(UnsupportedError, match=r"^reference: activation must be one of .*'tanh'"):
        moe_definition(x, ids, routing, **float_weights(4, 8, 56, True), activation="tanh")


# The activation quantiser, a second time: codes by distance, scales by table.

# All finite e4m3 values by code: 4 exponent bits of bias 7, 3 mantissa bits, no infinity.
E4M3 = torch.tensor(
    [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ]
)[:127].double()
E2M1 = torch.tensor(GRID + [-g for g in GRID]).double()


def nearest(values, table):
    """Index of the nearest entry for each float64 value; of two equally near ones the even code."""
    distance = (values.unsqueeze(-1) - table).abs()
    near = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(len(table)) % 2 == 0
    return (near * (1 + even.int())).argmax(-1)


def emulate(x, scale, intermediate=False):
    """NVFP4.round_activation (or _intermediate) of float32 x [N, K], one block at a time."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], 16):
        block = x[:, start : start + 16]
        amax, encode = block.abs().amax(1), 1 / scale
        wanted = (amax * encode if intermediate else amax / scale) * torch.tensor(1 / 6)
        s = E4M3[nearest(wanted.double(), E4M3)].float()  # the table ends at 448: saturation
        step = s * scale
        divided = block * (1 / s.unsqueeze(1)) * encode
        divided = divided if intermediate else block * (1 / step.unsqueeze(1))
        scaled = torch.where(s.unsqueeze(1) > 0, divided, 0.0)
        element = E2M1[nearest(scaled.double(), E2M1)].float()
        out[:, start : start + 16] = element * step.unsqueeze(1)
    return out


def test_the_tables_of_the_emulation():
    assert torch.equal(E4M3.float(), torch.arange(127).byte().view(torch.float8_e4m3fn).float())
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0]).double()
    assert E2M1[nearest(ties, E2M1)].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert E2M1[nearest(-ties, E2M1)].tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


def test_a_block_on_paper():
    # amax 2, scale 1: 2 / 6 = 0.333 -> e4m3 0.34375; 1 / 0.34375 = 2.9 -> 3, 2 -> 5.8 -> 6.
    x = torch.tensor([[1.0, 2.0, -0.05, -0.5] + [0.0] * 12])
    got = NVFP4.round_activation(x, torch.tensor([1.0]))
    assert got.tolist() == [[1.03125, 2.0625, 0.0, -0.515625] + [0.0] * 12]
    # amax 6, scale 1: the block scale is 1 and ties go to the even code.
    x = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -2.5, -0.25] + [0.0] * 5])
    want = [[6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, -2.0, 0.0] + [0.0] * 5]
    assert NVFP4.round_activation(x, torch.tensor([1.0])).tolist() == want


def test_the_block_scale_is_a_product():
    # amax x fl(1/6) is 1.1875, a tie that goes to 1.25; amax / 6 would be just below it, 1.125.
    x = torch.zeros(1, 16)
    x[0, 0] = torch.nextafter(torch.tensor(7.125), torch.tensor(0.0))
    assert NVFP4.round_activation(x, torch.tensor([1.0]))[0, 0] == 6 * 1.25
    assert (x[0, 0] / 6).to(torch.float8_e4m3fn).item() == 1.125


def activations(columns):
    """Named float32 tensors [24, columns]."""
    x = torch.randn(24, columns)
    yield "normal", x
    yield "wide", x * torch.exp2(torch.randint(-30, 12, (24, columns)).float())
    zeros = x.clone()
    zeros[::2, :16], zeros[1, :] = 0, -0.0
    yield "zero blocks", zeros
    yield "blocks far apart", x * torch.exp2(torch.arange(24).float() * 2 - 30).unsqueeze(1)
    yield "on the grid", E2M1[torch.randint(0, 16, (24, columns))].float()
    yield "quarters", torch.randint(-24, 25, (24, columns)) / 4.0


@pytest.mark.parametrize("columns", [16, 48, 5, 40], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9, 1e-4, 1e-9, 300.0], ids=str)
def test_activation_quantiser_bit_for_bit(columns, scale):
    scale = torch.tensor([scale])
    for name, x in activations(columns):
        got = NVFP4.round_activation(x, scale)
        assert torch.equal(got, emulate(x, scale)), name
        other = NVFP4.round_intermediate(x, scale)
        assert torch.equal(other, emulate(x, scale, intermediate=True)), name
        # Any leading axes.
        assert torch.equal(NVFP4.round_activation(x.view(2, 3, 4, -1), scale).view_as(x), got)


def test_scales_that_underflow_and_saturate():
    scale = torch.tensor([0.5])
    x = torch.zeros(4, 16)
    # Half of the smallest e4m3 value, 2^-10, goes to the even code, 0; what is above stays.
    x[0, 3] = 2.0**-10 * 6 * 0.5
    x[1, 3] = torch.nextafter(x[0, 3], torch.tensor(1.0)) * (1 + 2.0**-20)
    # 448 * 6 * 0.5 = 1344 is the largest value; the rest of that block keeps its step.
    x[2] = torch.linspace(-1e9, 1e9, 16)
    x[3, 0], x[3, 1] = math.inf, 600.0
    got = NVFP4.round_activation(x, scale)
    assert got[0].eq(0).all()
    assert got[1].tolist() == [0, 0, 0, 2.0**-9 * 6 * 0.5 / 2] + [0] * 12
    assert got[2].tolist() == [-1344.0] * 8 + [1344.0] * 8
    assert got[3].tolist() == [1344.0, 672.0] + [0.0] * 14
    assert torch.equal(got[:3], emulate(x[:3], scale))


def test_activation_quantiser_keeps_its_error_bound():
    """Half a step of the grid and half a step of e4m3: where nothing saturates or underflows."""
    x = torch.randn(512, 64)
    scale = x.abs().max() / (6 * 448)
    error = (NVFP4.round_activation(x, scale) - x).unflatten(1, (-1, 16)).abs().amax(-1)
    amax = x.unflatten(1, (-1, 16)).abs().amax(-1)
    # A step of 2 of 6 at most, scaled by (1 + 1/16), or the top clipped by 1/16.
    assert (error <= amax / 6 * (1 + 2.0**-4) * (1 + 1e-6)).all()
    assert error.max() > 0.05 * amax.max()


@pytest.mark.parametrize("scale", [0.0017, 2.0**-9, 0.004])
def test_modelopt_quantises_activations_alike(scale):
    """Outside zero and underflowing blocks, and but for quotients that are as good as a tie."""
    NVFP4QTensor = pytest.importorskip(
        "modelopt.torch.quantization.qtensor.nvfp4_tensor", reason="optional package"
    ).NVFP4QTensor
    x = torch.randn(256, 128)
    ours = NVFP4.round_activation(x, torch.tensor([scale]))
    q, block_scale, double = NVFP4QTensor.quantize(
        x.clone(), 16, weights_scaling_factor_2=torch.tensor(scale)
    )
    theirs = q.dequantize(
        torch.float32, scale=block_scale, double_scale=double, block_sizes={-1: 16}
    )
    wanted = x.double().unflatten(1, (-1, 16)).abs().amax(-1) / scale / 6
    assert (wanted > 2.0**-6).all() and (wanted < 448).all()

    def near_tie(values, table):
        middle = (table[1:] + table[:-1]) / 2
        gap = (values.unsqueeze(-1) - middle).abs().amin(-1)
        return gap <= 2.0**-20 * values

    s = E4M3[nearest(wanted, E4M3)]
    scaled = (x.double().unflatten(1, (-1, 16)) / (s * scale).unsqueeze(-1)).abs()
    unclear = near_tie(wanted, E4M3).unsqueeze(-1) | near_tie(scaled, E2M1[:8])
    assert unclear.float().mean() < 1e-3
    same = torch.isclose(ours, theirs, rtol=2.0**-22, atol=0).unflatten(1, (-1, 16))
    assert (same | unclear).all()


# The W4A4 layer, a second time.


def w4a4_by_hand(x, weights, ids, routing):
    """[T, H] float64, one token and slot at a time, from weights that are exact in float64."""
    parts = weights.dequantize(torch.float64)
    f, _ = FORMULAS[weights.activation]
    codes = emulate(x.bfloat16().float(), weights.hidden_scale).double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    size = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])):
        e = int(ids[t, k]) - weights.expert_offset
        if 0 <= e < weights.local_experts:
            up = parts["up"][e] @ codes[t]
            h = f(parts["gate"][e] @ codes[t]).float() * up.float() if weights.gated else f(up)
            assert torch.equal(up.float().double(), up)  # the first GEMM is exact in float32
            h = emulate(h.float().unsqueeze(0), weights.intermediate_scale[e], intermediate=True)
            h = h[0].double()
            y = (parts["down"][e] @ h).float().bfloat16().double()
            out[t] += routing[t, k].double() * y
            size[t] += (routing[t, k].double() * y).abs()
    return out, size


@every_activation
@every_form
def test_w4a4_layer_by_hand(activation, gated):
    """Few-bit numbers keep both GEMMs exact, so no rounding can move a code."""
    local, hidden, intermediate = 3, 32, 48

    def grid(*shape):
        return E2M1[torch.randint(0, 16, shape)].float()

    weights = grid_weights(
        grid(local, intermediate, hidden),
        grid(local, hidden, intermediate),
        grid(local, intermediate, hidden) if gated else None,
        activation=activation,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=5,
        expert_offset=1,
        hidden_scale=torch.tensor([2.0**-6]),
        intermediate_scale=torch.tensor([0.25, 1.0, 3.0]),
    )
    x = torch.randn(13, hidden) / 16
    ids, routing = torch.randint(-1, 6, (13, 3)), torch.randn(13, 3)
    ids[0] = 2
    want, size = w4a4_by_hand(x, weights, ids, routing)
    got = reference_w4a4(x, weights, ids, routing)
    assert ((got.double() - want).abs() <= 5 * UNIT * size).all()
    low = reference_w4a4(x.bfloat16(), weights, ids, routing)
    assert torch.equal(low, got.bfloat16())
    # Both quantisers act: without either the result is another one.
    assert (reference(x, weights, ids, routing) - got).norm() > 0.01 * got.norm()


def test_each_experts_output_is_rounded_to_bfloat16():
    # x = 6 and the intermediate 6 x (6, 6, 1.5) are exact in NVFP4 with these scales; both experts
    # give 6 x (6 x 6 + 6 x 1 + 1.5 x 0.5) = 256.5, which is 256 in bfloat16.
    up, down = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    up[:, :3, 0] = torch.tensor([6.0, 6.0, 1.5])
    down[:, 0, :3] = torch.tensor([6.0, 1.0, 0.5])
    weights = grid_weights(
        up,
        down,
        activation="identity",
        hidden_size=1,
        intermediate_size=16,
        intermediate_scale=torch.full((2,), 6.0),
    )
    args = torch.tensor([[6.0]]), weights, torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.7]])
    # Rounding the weighted terms instead gives 360, rounding the sum 358.
    assert reference_w4a4(*args).item() == pytest.approx(2 * 0.7 * 256.0, rel=1e-6)
    assert reference(*args).item() == pytest.approx(2 * 0.7 * 256.5, rel=1e-6)
