"""The activation table against its formulas in float64, and the recognition of a function."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from fp4moe.activations import ACTIVATIONS, get_activation, identify_activation
from fp4moe.errors import UnsupportedError

C = math.sqrt(2 / math.pi)
# Written out a second time, in float64.
FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x * x * x))),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2)),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "identity": lambda x: x,
}

# At -1, 0.5 and 2, from a table of the normal distribution and a pocket calculator.
BY_HAND = {
    "silu": (-0.2689414, 0.3112297, 1.7615942),
    "gelu_tanh": (-0.1588080, 0.3457140, 1.9545977),
    "gelu": (-0.1586553, 0.3457312, 1.9544997),
    "relu2": (0.0, 0.25, 4.0),
    "relu": (0.0, 0.5, 2.0),
    "identity": (-1.0, 0.5, 2.0),
}


def test_the_tables_of_this_file_are_complete():
    assert list(ACTIVATIONS) == list(FORMULAS) == list(BY_HAND)
    assert all(activation.name == name for name, activation in ACTIVATIONS.items())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_by_hand(name):
    got = ACTIVATIONS[name].function(torch.tensor([-1.0, 0.5, 2.0]))
    # Half a unit of the table's last digit, and 4 ulp: each CPU has its own vector erf and tanh.
    torch.testing.assert_close(got, torch.tensor(BY_HAND[name]), rtol=4 * 2.0**-23, atol=5e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name):
    x = torch.linspace(-12.0, 12.0, 4001)
    got = ACTIVATIONS[name].function(x).double()
    want = FORMULAS[name](x.double())
    # The result and its inner tanh, erf or exp round a few times, relative to x.
    limit = 8 * 2.0**-24 * torch.maximum(want.abs(), x.double().abs())
    assert ((got - want).abs() <= limit).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zero_stays_zero(name):
    zero = torch.tensor([0.0, -0.0])
    assert ACTIVATIONS[name].function(zero).eq(0).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_function_is_recognised(name):
    assert identify_activation(FORMULAS[name]) == name
    assert identify_activation(ACTIVATIONS[name].function) == name


TRANSFORMERS_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "identity",
    # None of ours, although some come near one of them.
    "quick_gelu": None,
    "gelu_10": None,
    "relu6": None,
    "mish": None,
    "leaky_relu": None,
    "sigmoid": None,
    "tanh": None,
}


@pytest.mark.parametrize("name", TRANSFORMERS_NAMES)
def test_the_activations_of_transformers(name):
    assert identify_activation(ACT2FN[name]) == TRANSFORMERS_NAMES[name]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x).clamp(max=7.0),
        lambda x: F.silu(1.001 * x),
        lambda x: F.relu(x) + 1e-4,
        lambda x: x * float("nan"),
        lambda x: x[:, :10],
        lambda x: x.sum(),
        lambda x: None,
    ],
    ids=["clamped", "scaled", "shifted", "NaN", "other shape", "scalar", "no tensor"],
)
def test_a_neighbour_is_not_recognised(function):
    assert identify_activation(function) is None


def test_a_function_that_works_in_place_is_recognised():
    assert identify_activation(torch.nn.SiLU(inplace=True)) == "silu"


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(UnsupportedError) as error:
        get_activation("swish", caller="f")
    assert str(error.value) == (
        "f: activation must be one of silu, gelu_tanh, gelu, relu2, relu, identity; got 'swish'. "
        "Pass one of these names."
    )
