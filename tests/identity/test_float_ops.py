"""float_moe and float_moe_from_logits: numbers, contract with torch, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.identity.float_weights import FloatWeights, StoredForm
from fp4moe.identity.table import find_packed
from fp4moe.kernels import get_kernel
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.reference import moe_definition

E, H, INNER, T, K = 4, 32, 16, 5, 2
MOE = torch.ops.fp4moe.float_moe.default
FROM_LOGITS = torch.ops.fp4moe.float_moe_from_logits.default
GIVEN = torch.ops.fp4moe.nvfp4_moe.default


def floats(*shape):
    return torch.randn(shape) / 4


def stored(layout, transposed=False, activation="silu", kernel="reference"):
    return StoredForm("nvfp4", activation, layout, transposed, transposed, kernel, 256)


def separate():
    return FloatWeights((floats(E, INNER, H),), (floats(E, INNER, H),), (floats(E, H, INNER),))


def listed():
    return FloatWeights(*(tuple(group[0].clone()) for group in separate() if group))


FORMS = {
    "gate_up": (
        lambda: FloatWeights((floats(E, 2 * INNER, H),), (), (floats(E, H, INNER),)),
        stored("gate_up"),
    ),
    "interleaved and transposed": (
        lambda: FloatWeights((floats(E, H, 2 * INNER),), (), (floats(E, INNER, H),)),
        stored("up_gate_interleaved", transposed=True),
    ),
    "without a gate": (
        lambda: FloatWeights((floats(E, INNER, H),), (), (floats(E, H, INNER),)),
        stored("", activation="relu2"),
    ),
    "gate and up apart": (separate, stored("gate, up")),
    "a tensor for each expert": (listed, stored("up, gate")),
}


def logical(weights, form):
    """The same weights by ExpertWeights' own arguments, put together here."""
    first, second, down, *_biases = (torch.stack(group) if group else None for group in weights)
    first = first[0] if first.ndim == 4 else first
    second = second[0] if second is not None and second.ndim == 4 else second
    down = down[0] if down.ndim == 4 else down
    if form.transposed:
        first, down = first.mT, down.mT
    if second is not None:
        gate, up = (first, second) if form.layout == "gate, up" else (second, first)
    elif form.layout == "gate_up":
        gate, up = first.chunk(2, 1)
    elif form.layout == "up_gate_interleaved":
        gate, up = first[:, 1::2], first[:, ::2]
    else:
        gate, up = None, first
    return ExpertWeights.quantize(up=up, down=down, gate=gate, activation=form.activation)


def routed():
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return floats(T, H), ids, torch.rand(T, K)


@pytest.mark.parametrize("name", FORMS)
def test_numbers(name):
    make, form = FORMS[name]
    weights, inputs = make(), routed()
    prepared = get_kernel("reference").prepare(logical(weights, form), hidden_alignment=256)
    expected = GIVEN(*inputs, *nvfp4_moe_arguments(prepared, "reference"))
    assert torch.equal(MOE(*inputs, *map(list, weights), *form), expected)
    assert expected.abs().max() > 0


def with_biases(weights, form):
    """The same with biases in the shapes of the weights' outputs."""
    sizes = {"first": 2 * INNER if form.layout.startswith(("gate_up", "up_gate")) else INNER}
    sizes |= {"second": INNER, "down": H}
    biases = {}
    for role in ("first", "second", "down"):
        group = getattr(weights, role)
        shape = (sizes[role],) if group and group[0].ndim == 2 else (E, sizes[role])
        biases[f"{role}_bias"] = tuple(floats(*shape) for _ in group)
    return weights._replace(**biases)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_numbers_with_biases(name):
    make, form = FORMS[name]
    if form.gated:
        form = form._replace(activation="silu(alpha=1.702,beta=1,limit=0.5)")
    inputs, weights = routed(), with_biases(make(), form)
    plain = logical(weights, form)
    first, second, down = (
        None if not group else group[0] if group[0].ndim == 2 else torch.stack(group)
        for group in weights[3:]
    )
    if form.layout == "gate, up":
        gate, up = first, second
    elif form.layout == "up, gate":
        gate, up = second, first
    elif form.layout == "gate_up":
        gate, up = first.chunk(2, 1)
    else:
        gate, up = (first[:, 1::2], first[:, ::2]) if form.gated else (None, first)
    parts = plain.dequantize() | {"up_bias": up, "down_bias": down}
    parts |= {} if gate is None else {"gate_bias": gate}
    expected = moe_definition(*inputs, **parts, activation=form.activation)
    torch.testing.assert_close(MOE(*inputs, *map(list, weights), *form), expected)
    without = MOE(*inputs, *map(list, make()), *form)
    assert (expected - without).norm() > 0.1 * without.norm()
    torch.library.opcheck(MOE, (*inputs, *map(list, weights), *form))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_contract_with_torch(name):
    make, form = FORMS[name]
    torch.library.opcheck(MOE, (*routed(), *map(list, make()), *form))


@pytest.mark.parametrize("scaled", [False, True])
def test_contract_of_the_one_that_routes(scaled):
    make, form = FORMS["gate_up"]
    scale = torch.rand(E) + 0.5 if scaled else torch.empty(0)
    weights = [list(group) for group in make()]
    routing = ("softmax_topk", K, 1, 1, 1.0)
    args = (floats(T, H), floats(T, E), torch.empty(0), scale, *weights, *routing, *form)
    torch.library.opcheck(FROM_LOGITS, args)
    plain = FROM_LOGITS(*args[:3], torch.empty(0), *args[4:])
    twice = FROM_LOGITS(*args[:3], torch.full((E,), 2.0), *args[4:])
    # Twice the down projection's global scale, to the bit.
    assert torch.equal(twice, 2 * plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(T, H + 1)}, "hidden must have 32 columns, as its experts"),
        ({"second": [torch.zeros(E, INNER, H)]}, "second must hold nothing for layout 'gate_up'"),
        ({"down": [torch.zeros(E, H, INNER + 1)]}, "first must be float"),
        ({"down": []}, "first and down must hold tensors"),
        ({"first": [torch.zeros(E, 2 * INNER, H, dtype=torch.int8)]}, "first must be float"),
        ({"first": [torch.zeros(2 * INNER, H)] * 3}, "first must hold one stacked tensor or 4"),
        ({"down_bias": [torch.zeros(E, H)]}, "first_bias must hold tensors for layout 'gate_up'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    make, form = FORMS["gate_up"]
    weights = make()
    names = ("hidden", "expert_ids", "routing_weights", *FloatWeights._fields)
    args = dict(zip(names, (*routed(), *map(list, weights)), strict=True)) | change
    with pytest.raises(ShapeError, match=f"^float_moe: {message}.* got "):
        MOE(*args.values(), *form)


@pytest.mark.parametrize("field, value", [("format", "fp3"), ("layout", "sideways")])
def test_unknown_words_are_named(field, value):
    make, form = FORMS["gate_up"]
    with pytest.raises(UnsupportedError, match=f"float_moe: {field} must .* got '{value}'"):
        MOE(*routed(), *map(list, make()), *form._replace(**{field: value}))


def test_a_form_of_its_own_for_each_kernel_and_released_ones_in_no_other():
    make, form = FORMS["gate_up"]
    weights = make()
    entry = find_packed(weights, form, caller="test")
    assert find_packed(weights, form, caller="test") is entry
    other = form._replace(kernel="reference_w4a4")
    assert find_packed(weights, other, caller="test") is not entry
    entry.release(weights.flat(), 0)
    assert find_packed(weights, form, caller="test") is entry
    with pytest.raises(
        UnsupportedError, match=r"^test: the experts cannot be packed .* released .* again"
    ):
        find_packed(weights, form._replace(hidden_alignment=128), caller="test")
