"""The activation table against its formulas in float64, and the recognition of a function."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from fp4moe.activations import (
    ACTIVATIONS,
    Activation,
    get_activation,
    identify_activation,
    recognise,
)
from fp4moe.errors import ShapeError, UnsupportedError

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
    # 1.702 as its class has it.
    "quick_gelu": "silu(alpha=1.702)",
    # None of ours, although some come near one of them.
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
        lambda x: x * torch.sigmoid(1.702 * x) + 1e-4 * x,
        lambda x: F.relu(x) + 1e-4,
        lambda x: x * float("nan"),
        lambda x: x[:, :10],
        lambda x: x.sum(),
        lambda x: None,
    ],
    ids=[
        "clamped",
        "scaled",
        "alpha and more",
        "shifted",
        "NaN",
        "other shape",
        "scalar",
        "no tensor",
    ],
)
def test_a_neighbour_is_not_recognised(function):
    assert identify_activation(function) is None


def test_a_function_that_works_in_place_is_recognised():
    assert identify_activation(torch.nn.SiLU(inplace=True)) == "silu"


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(UnsupportedError) as error:
        get_activation("swish", caller="f")
    assert str(error.value) == (
        "f: activation must be one of silu, gelu_tanh, gelu, relu2, relu, identity, silu_step, "
        "silu_softcap; got 'swish'. Pass one of these names."
    )


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


# Each written out as the model that has it does, in float64.
COMBINED = {
    # gpt_oss, minimax_m3.
    "silu(alpha=1.702,beta=1,limit=7)": lambda g, u: (
        (torch.where(u.abs() > 7, 7 * u.sign(), u) + 1)
        * torch.minimum(g, torch.tensor(7.0))
        * sigmoid(1.702 * torch.minimum(g, torch.tensor(7.0)))
    ),
    # deepseek_v4, hy_v4, glm5_next.
    "silu(limit=10)": lambda g, u: (
        torch.minimum(g, torch.tensor(10.0))
        * sigmoid(torch.minimum(g, torch.tensor(10.0)))
        * torch.where(u.abs() > 10, 10 * u.sign(), u)
    ),
    # step3p7.
    "silu_step(limit=7)": lambda g, u: (
        torch.minimum(g * sigmoid(g), torch.tensor(7.0)) * torch.where(u.abs() > 7, 7 * u.sign(), u)
    ),
    # inkling2.
    "silu_softcap(alpha=4,beta=25)": lambda g, u: (
        4 * torch.tanh(g / 4) * sigmoid(g) * 25 * torch.tanh(u / 25)
    ),
    "gelu_tanh(limit=5)": lambda g, u: (
        FORMULAS["gelu_tanh"](torch.minimum(g, torch.tensor(5.0))) * u.clip(-5, 5)
    ),
    "relu2(beta=0.5)": lambda g, u: FORMULAS["relu2"](g) * (u + 0.5),
}
PARAMETERS = {
    "silu(alpha=1.702,beta=1,limit=7)": Activation("silu", 1.702, 1, 7),
    "silu(limit=10)": Activation("silu", limit=10),
    "silu_step(limit=7)": Activation("silu_step", limit=7),
    "silu_softcap(alpha=4,beta=25)": Activation("silu_softcap", 4, 25),
    "gelu_tanh(limit=5)": Activation("gelu_tanh", limit=5),
    "relu2(beta=0.5)": Activation("relu2", beta=0.5),
}


@pytest.mark.parametrize("text", COMBINED)
def test_formulas_of_gate_and_up(text):
    gate, up = torch.randn(2, 10_000) * 8
    got = get_activation(text).combine(up, gate).double()
    want = COMBINED[text](gate.double(), up.double())
    # Both factors round a few times, relative to gate and up.
    limit = 16 * 2.0**-24 * (gate.abs() * (up.abs() + 1)).double().clamp(min=1)
    if text.startswith("relu2"):
        limit *= gate.abs().clamp(min=1)
    assert ((got - want).abs() <= limit).all()
    # By hand: clamped gate and up of the first, 7 sigmoid(11.914) (7 + 1) = 55.99962.
    if text.startswith("silu(alpha"):
        got = get_activation(text).combine(torch.tensor([50.0, -50.0]), torch.tensor([50.0, 50.0]))
        torch.testing.assert_close(got, torch.tensor([55.99962, -41.99972]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("text", COMBINED)
def test_the_text_is_canonical_and_parses_back(text):
    assert str(PARAMETERS[text]) == text
    assert Activation.parse(text) == PARAMETERS[text] == get_activation(PARAMETERS[text])
    spaced = text.replace(",", " , ").replace("(", " ( ").replace("=", " = ")
    assert Activation.parse(spaced) == PARAMETERS[text]
    assert Activation.parse(f"{Activation('silu', alpha=0.1 + 0.2)}").alpha == 0.1 + 0.2


@pytest.mark.parametrize("text", COMBINED)
def test_gate_and_up_are_recognised(text):
    assert str(recognise(COMBINED[text])) == text
    for dtype in (torch.float32, torch.float64):
        function = PARAMETERS[text].combine
        assert str(recognise(lambda g, u, f=function, d=dtype: f(u.to(d), g.to(d)))) == text


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_plain_product_is_recognised(name):
    assert str(recognise(lambda g, u: FORMULAS[name](g) * u)) == name


def test_steps_that_a_clamp_before_cannot_be_told_from():
    # silu(20) = 20 - 4e-8: both clamp to the same float32 numbers.
    step = Activation("silu_step", limit=20)
    assert str(recognise(lambda g, u: step.combine(u, g))) == "silu(limit=20)"


@pytest.mark.parametrize(
    "combine",
    [
        lambda g, u: F.silu(g) * u * 1.01,
        lambda g, u: F.silu(g).clamp(max=6) * u,
        lambda g, u: F.silu(g.clamp(max=7)) * u.clamp(max=7),
        lambda g, u: F.gelu(1.001 * g) * u,
        lambda g, u: F.silu(g.clamp(-7, 7)) * u.clamp(-7, 7) + 1e-2 * u,
        lambda g, u: torch.full_like(g, float("nan")),
        lambda g, u: g[:, :3],
    ],
)
def test_a_neighbouring_pair_is_not_recognised(combine):
    assert recognise(combine) is None


@pytest.mark.parametrize("text", COMBINED)
def test_zero_gate_and_up_stay_zero(text):
    zero = torch.zeros(4)
    assert get_activation(text).combine(zero, zero).eq(0).all()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Activation("silu_step"), ShapeError, "silu_step must be a limit"),
        (lambda: Activation("silu_softcap", 4, 25, 7), ShapeError, "alpha and beta above 0"),
        (lambda: Activation("silu", limit=-1), ShapeError, "limit must be finite and not neg"),
        (lambda: Activation("silu", math.inf), ShapeError, "alpha must be finite"),
        (lambda: Activation("gelu", 1.5), UnsupportedError, "alpha of gelu must be 1"),
        (lambda: Activation.parse("silu(gamma=1)"), ShapeError, "only alpha, beta and limit"),
        (lambda: Activation.parse("silu(7)"), ShapeError, "only alpha, beta and limit"),
        (lambda: Activation.parse("silu(limit=7"), UnsupportedError, "must be one of"),
        (
            lambda: get_activation("silu(limit=7)").check_gate(False, caller="f"),
            UnsupportedError,
            "f: activation must be a plain one without a gate",
        ),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
