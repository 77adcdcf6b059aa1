"""The activations of an expert: one table, parameters, and recognition by numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .errors import UnsupportedError, must

__all__ = ["ACTIVATIONS", "Activation", "get_activation", "identify_activation", "recognise"]


@dataclasses.dataclass(frozen=True)
class Function:
    """A row of the table; all of them map 0 to 0, so that zero padding is exact.

    Attributes:
        name: what schemas and options call it.
        function: the exact definition in torch, element by element.
        slope: its derivative, where it has none that of the left side.
        formula: the function for a reader.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    formula: str


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _silu_slope(x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    share = torch.sigmoid(alpha * x)
    return share * (1 + alpha * x * (1 - share))


def _gelu_tanh_slope(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")


def _gelu_slope(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def _relu_slope(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)


def _relu2_slope(x: torch.Tensor) -> torch.Tensor:
    return 2 * F.relu(x)


GELU_TANH = "x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))"
ACTIVATIONS: dict[str, Function] = {
    f.name: f
    for f in (
        Function("silu", F.silu, _silu_slope, "x * sigmoid(x)"),
        Function("gelu_tanh", _gelu_tanh, _gelu_tanh_slope, GELU_TANH),
        Function("gelu", F.gelu, _gelu_slope, "x/2 * (1 + erf(x / sqrt(2)))"),
        Function("relu2", _relu2, _relu2_slope, "max(x, 0)^2"),
        Function("relu", F.relu, _relu_slope, "max(x, 0)"),
        Function("identity", _identity, torch.ones_like, "x"),
    )
}
# Of gate and up together. A limit, or both caps, are required.
PAIRED = {
    "silu_step": "min(silu(gate), limit) * clamp(up, -limit, limit)",
    "silu_softcap": "alpha tanh(gate / alpha) sigmoid(gate) * beta tanh(up / beta)",
}
_TEXT = re.compile(r"(\w+)\s*(?:\(([^()]*)\))?")


@dataclasses.dataclass(frozen=True)
class Activation:
    """What stands between an expert's two GEMMs.

    With a gate, `act(min(gate, limit)) * (clamp(up, -limit, limit) + beta)`, without one `act(up)`;
    `silu` of alpha is x * sigmoid(alpha x). The names in `PAIRED` have formulas of their own. All
    give 0 for gate = up = 0.

    Attributes:
        name: of `ACTIVATIONS` or `PAIRED`.
        alpha: of silu; the gate's cap of silu_softcap.
        beta: added to up; up's cap of silu_softcap.
        limit: 0 for none.

    Raises:
        UnsupportedError: no such name, or a parameter that it does not have.
        ShapeError: a parameter is not finite, or is negative.
    """

    name: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS and self.name not in PAIRED:
            must(
                "Activation: name",
                f"be one of {', '.join((*ACTIVATIONS, *PAIRED))}",
                repr(self.name),
                "Pass one of these names.",
                error=UnsupportedError,
            )
        for parameter in ("alpha", "beta", "limit"):
            value = getattr(self, parameter)
            if not math.isfinite(value) or (value < 0 and parameter != "beta"):
                rule = "be finite" if parameter == "beta" else "be finite and not negative"
                must(f"Activation: {parameter}", rule, value, "Pass the model's own number.")
            object.__setattr__(self, parameter, float(value))
        capped = self.name == "silu_softcap"
        if capped or self.name == "silu_step":
            required = self.alpha > 0 and self.beta > 0 if capped else self.limit > 0
            others = self.limit if capped else (self.alpha != 1 or self.beta)
            if not required or others:
                has = "alpha and beta above 0 and no others" if capped else "a limit and no others"
                got = f"alpha={self.alpha}, beta={self.beta}, limit={self.limit}"
                advice = f"It computes {PAIRED[self.name]}."
                must(f"Activation: the parameters of {self.name}", f"be {has}", got, advice)
        elif self.alpha != 1 and self.name != "silu":
            must(
                f"Activation: alpha of {self.name}",
                "be 1, only silu has one",
                self.alpha,
                "Leave it out.",
                error=UnsupportedError,
            )

    @property
    def plain(self) -> bool:
        """Whether it is a function alone, with no parameter and no clamp."""
        return self.name in ACTIVATIONS and (self.alpha, self.beta, self.limit) == (1, 0, 0)

    @property
    def needs_gate(self) -> bool:
        """Whether it has no meaning without a gate."""
        return self.name in PAIRED or bool(self.beta or self.limit)

    def function(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function of one argument, without a limit."""
        if self.alpha != 1:
            return x * torch.sigmoid(self.alpha * x)
        return ACTIVATIONS[self.name].function(x)

    def combine(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the down projection takes; the definition where the tensors are float32."""
        if gate is None:
            return self.function(up)
        if self.name == "silu_softcap":
            capped = self.alpha * torch.tanh(gate / self.alpha) * torch.sigmoid(gate)
            return capped * (self.beta * torch.tanh(up / self.beta))
        if self.name == "silu_step":
            return F.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.function(gate) * (up + self.beta if self.beta else up)

    def slope(self, x: torch.Tensor) -> torch.Tensor:
        """Return the derivative of `function`."""
        return _silu_slope(x, self.alpha) if self.alpha != 1 else ACTIVATIONS[self.name].slope(x)

    def gradients(
        self, gradient: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return those of up, and of gate where there is one, through `combine`.

        A clamp passes on the gradient of values between its limits, and of the limits themselves.
        """
        if gate is None:
            return (gradient * self.slope(up),)
        if self.name == "silu_softcap":
            share, capped = torch.sigmoid(gate), torch.tanh(gate / self.alpha)
            of_gate = share * (1 - capped.square() + self.alpha * capped * (1 - share))
            cap = torch.tanh(up / self.beta)
            to_up = self.alpha * capped * share * (1 - cap.square())
            return gradient * to_up, gradient * of_gate * (self.beta * cap)
        if self.name == "silu_step":
            value = F.silu(gate)
            to_up = value.clamp(max=self.limit) * (up.abs() <= self.limit)
            to_gate = _silu_slope(gate) * (value <= self.limit) * up.clamp(-self.limit, self.limit)
            return gradient * to_up, gradient * to_gate
        within_up = within_gate = torch.ones((), dtype=torch.bool, device=up.device)
        if self.limit:
            within_gate, within_up = gate <= self.limit, up.abs() <= self.limit
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        to_gate = self.slope(gate) * (up + self.beta if self.beta else up)
        return gradient * self.function(gate) * within_up, gradient * to_gate * within_gate

    def __str__(self) -> str:
        """Return the canonical text, which schemas and checkpoints hold: the name if plain."""
        texts = [
            f"{field.name}={getattr(self, field.name)!r}".removesuffix(".0")
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({','.join(texts)})" if texts else self.name

    @classmethod
    def parse(cls, text: str | Activation, *, caller: str = "Activation.parse") -> Activation:
        """Return the activation of a text such as "silu(alpha=1.702,beta=1,limit=7)".

        Raises:
            UnsupportedError: no such activation; lists the known ones.
        """
        return text if isinstance(text, Activation) else _parse(text, caller)

    def check_gate(self, gated: bool, *, caller: str) -> None:
        """Raise UnsupportedError where it needs a gate and there is none."""
        if self.needs_gate and not gated:
            rule = "be a plain one without a gate"
            got = repr(str(self))
            must(f"{caller}: activation", rule, got, "Pass gate, too.", error=UnsupportedError)


@functools.lru_cache(maxsize=1024)
def _parse(text: str, caller: str) -> Activation:
    found = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
    name = found[1] if found else text
    if name not in ACTIVATIONS and name not in PAIRED:
        must(
            f"{caller}: activation",
            f"be one of {', '.join((*ACTIVATIONS, *PAIRED))}",
            repr(text),
            "Pass one of these names.",
            error=UnsupportedError,
        )
    numbers: dict[str, float] = {}
    for item in filter(None, ((found and found[2]) or "").split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        try:
            numbers[key] = float(value)
        except ValueError:
            key = ""
        if key not in ("alpha", "beta", "limit"):
            rule = "have only alpha, beta and limit, each with a number"
            must(f"{caller}: activation", rule, repr(text), 'Write "silu(alpha=1.702,limit=7)".')
    return Activation(name, **numbers)


def get_activation(name: str | Activation, *, caller: str = "Activation") -> Activation:
    """Return the activation of that name or text.

    Raises:
        UnsupportedError: no such activation; lists the known ones.
    """
    return Activation.parse(name, caller=caller)


def probe_values() -> torch.Tensor:
    """Return [1, 512] float32 in -40..40, dense near zero: clamps and both GELUs show."""
    wide = torch.linspace(-40.0, 40.0, 256, dtype=torch.float32, device="cpu")
    dense = torch.linspace(-4.0, 4.0, 256, dtype=torch.float32, device="cpu")
    return torch.cat((wide, dense)).reshape(1, -1)


def identify_activation(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Return the text of the activation that `function` of one argument computes, or None.

    Compared on float32 values in -40..40. The two GELUs differ by up to 4.7e-4, the limit is 2e-6
    of the largest value, about 16 float32 roundings.
    """
    probe = probe_values()
    with torch.no_grad():
        result = function(probe.clone())
        if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
            return None
        at_one = float(function(torch.ones_like(probe)).reshape(-1)[0])
        for activation in (*map(Activation, ACTIVATIONS), *_with_alpha(at_one)):
            expected = activation.function(probe)
            limit = 2e-6 * torch.clamp(expected.abs(), min=1.0)
            if bool(((result.float() - expected).abs() <= limit).all()):
                return str(activation)
    return None


# Gate and up where the numbers of an unknown pair show; beyond every limit and cap.
FAR = 1e4


def recognise(combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Activation | None:
    """Return the activation that `combine(gate, up)` of float32 [1, N] computes, or None.

    Parameters are read off a few values, then every candidate is compared on `probe_values` in all
    signs and on values up to 10,000, with 2e-6 of gate times up: 16 float32 roundings. Where two
    agree, as silu and silu_step do with limits above 13, the first in the order of the tables wins.
    """
    probe = probe_values()
    far = torch.tensor([[FAR, -FAR, 1e3, -1e3, 100.0, -100.0]], dtype=torch.float32, device="cpu")
    gate = torch.cat((probe, probe, far, far), 1)
    up = torch.cat((probe.flip(1), torch.ones_like(probe), far.flip(1), far), 1)
    points = ((1.0, 0.0), (1.0, 1.0), (1.0, FAR), (FAR, FAR), (FAR, 1.0))
    pairs = torch.tensor(points, dtype=torch.float32, device="cpu").T
    with torch.no_grad():
        result = combine(gate.clone(), up.clone())
        if not isinstance(result, torch.Tensor) or result.shape != gate.shape:
            return None
        read = combine(pairs[:1].clone(), pairs[1:].clone()).double().reshape(-1).tolist()
        for activation in _candidates(*read):
            expected = activation.combine(up, gate)
            scale = torch.maximum(expected.abs(), gate.abs().clamp(max=40.0))
            if bool(((result.float() - expected).abs() <= 2e-6 * scale.clamp(min=40.0)).all()):
                return activation
    return None


def _candidates(zero: float, one: float, far: float, ends: float, cap: float) -> Iterator:
    """Yield what may compute combine(1, 0), (1, 1), (1, FAR), (FAR, FAR) and (FAR, 1)."""
    yield from map(Activation, ACTIVATIONS)
    slope = one - zero
    if not math.isfinite(sum((zero, one, far, ends, cap))) or not slope:
        return
    beta, limit = zero / slope, (far - zero) / slope
    limit = 0.0 if limit > 0.99 * FAR or limit <= 0 else limit
    for base in (*map(Activation, ACTIVATIONS), *_with_alpha(slope)):
        yield from _rounded(base.name, alpha=base.alpha, beta=beta, limit=limit)
    if limit:
        yield from _rounded("silu_step", limit=limit)
    if ends and 0 < abs(cap / ends) < 1:
        beta = 1 / math.atanh(cap / ends)
        if beta > 0 and ends / beta > 0:
            yield from _rounded("silu_softcap", alpha=ends / beta, beta=beta)


def _with_alpha(at_one: float) -> Iterator[Activation]:
    """Yield silu with the alpha that gives this value at 1."""
    if 0 < at_one < 1:
        yield from _rounded("silu", alpha=math.log(at_one / (1 - at_one)))


def _rounded(name: str, **numbers: float) -> Iterator[Activation]:
    """Yield the numbers that a configuration would hold, then those that were read."""
    for digits in (3, 4, 5, 8):
        found = {key: float(f"{value:.{digits}g}") for key, value in numbers.items()}
        found = {key: 0.0 if abs(value) < 1e-6 else value for key, value in found.items()}
        if all(value >= 0 for key, value in found.items() if key != "beta"):
            yield Activation(name, **found)
