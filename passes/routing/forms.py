"""Ask a slice of routing which method it is.

It runs on random logits in float32, its vectors random too, and is compared with fp4moe.routing
under every method and every role of its vectors. Exactly one may fit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch

from fp4moe.kernels import Routing
from fp4moe.random_floats import random_normal
from fp4moe.routing import ROUNDINGS, sigmoid_topk, softmax_topk

from ..graph.dataflow import hinted_shape, meta_value
from ..graph.execute import undisturbed
from .slice import RoutingSlice

__all__ = ["RoutingForm", "recognise_routing"]

PROBE_TOKENS = 64
# Tokens whose choice changes with logits moved by this much are too close to call.
NUDGE = 1e-5
Choose = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class RoutingForm:
    """A routing method with its settings.

    Attributes:
        method: what it computes, in words of fp4moe.routing.
        routing: for the operator; None where no kernel routes so.
        bias, output_scale: which of the slice's [E] vectors they are; None for none.
    """

    method: str
    routing: Routing | None
    bias: int | None = None
    output_scale: int | None = None

    def __str__(self) -> str:
        parts = [self.method]
        if self.bias is not None:
            parts.append("with a bias for the choice")
        if self.routing and self.routing.num_groups > 1:
            parts.append(f"{self.routing.top_groups} of {self.routing.num_groups} groups")
        if self.routing and self.routing.scaling != 1:
            parts.append(f"times {self.routing.scaling:g}")
        if self.output_scale is not None:
            parts.append("times a factor per expert")
        return ", ".join(parts)


def recognise_routing(found: RoutingSlice) -> tuple[RoutingForm | None, str]:
    """Return (the one method that fits, "" or why no kernel routes so), or (None, the reason)."""
    (tokens, experts), device = found.shape, meta_value(found.logits).device
    top_k = (hinted_shape(found.expert_ids) or (0, 0))[-1]
    generator = torch.Generator("cpu").manual_seed(0)
    with undisturbed(device):
        # Negative biases tell -inf from 0 for the experts of dropped groups.
        vectors = [random_normal(generator, (experts,)) - 2 for _ in found.vectors]
        vectors = [vector.to(device) for vector in vectors]
        parts = []
        try:
            for _ in range(-(-PROBE_TOKENS // max(tokens, 1))):
                logits = 2 * random_normal(generator, (tokens, experts)).to(device)
                parts.append((logits, *found.run(logits.clone(), [v.clone() for v in vectors])))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return None, f"it does not run by itself on random numbers: {error}"
        if any(p.shape != (tokens, top_k) for _, *pair in parts for p in pair):
            return None, "its ids and weights are not [T, K]"
        logits, ids, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        probes = _Probes(logits, vectors, ids.long(), weights.float(), found.literals())
        tried = [probes.fit(form, choose) for form, choose in _forms(found, top_k)]
    fitting = [form for form in tried if form is not None]
    # One expert a token has weight 1 by softmax and by sigmoid alike.
    alike = top_k == 1 and all("renormalised" in f.method and f.bias is None for f in fitting)
    if len(fitting) == 1 or (fitting and alike):
        form = fitting[0]
        return form, "" if form.routing else f"no kernel routes by {form.method}"
    if fitting:
        return None, f"it fits more than one method: {'; '.join(map(str, fitting))}"
    return None, "its numbers fit no known method"


def _forms(found: RoutingSlice, top_k: int) -> Iterator[tuple[RoutingForm, Choose]]:
    experts = found.shape[1]
    vectors = range(len(found.vectors))
    scale = 0 if len(vectors) == 1 else None
    if len(vectors) <= 1:
        routing = Routing("softmax_topk", top_k)
        renormalised = functools.partial(softmax_topk, renormalize=True)
        yield RoutingForm("softmax_topk, renormalised", routing, None, scale), renormalised
        for name, function in _NOT_FUSED.items():
            yield RoutingForm(name, None, None, scale), function
    for bias, output_scale in itertools.product((None, *vectors), (None, *vectors)):
        if {bias, output_scale} - {None} != set(vectors) or (bias, output_scale) == (0, 0):
            continue
        for groups, kept in found.groups():
            if top_k > experts // groups * kept:
                continue
            choose = functools.partial(sigmoid_topk, num_groups=groups, top_groups=kept)
            routing = Routing("sigmoid_topk", top_k, groups, kept)
            yield RoutingForm("sigmoid_topk, renormalised", routing, bias, output_scale), choose
            plain = functools.partial(choose, renormalize=False)
            yield RoutingForm("sigmoid_topk", None, bias, output_scale), plain


def _raw_topk(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits.topk(top_k)
    return ids, values


# Methods that FlashInfer's enumeration has and the operator has not. One sigmoid of the largest
# logit is Llama4's.
_NOT_FUSED: dict[str, Choose] = {
    "softmax_topk": softmax_topk,
    "the top k logits themselves": _raw_topk,
}


@dataclasses.dataclass
class _Probes:
    """What the slice made of random numbers.

    Attributes:
        logits [N, E], vectors of [E]: given. ids, weights [N, K]: returned.
        literals: numbers that may be its scaling.
    """

    logits: torch.Tensor
    vectors: list[torch.Tensor]
    ids: torch.Tensor
    weights: torch.Tensor
    literals: set[float]

    def fit(self, form: RoutingForm, choose: Choose) -> RoutingForm | None:
        """Return the form with its scaling where ids and weights are what it says, else None."""
        top_k = self.ids.shape[1]
        if form.bias is not None:
            choose = functools.partial(choose, bias=self.vectors[form.bias])
        expected_ids, expected = choose(self.logits, top_k)
        clear = torch.ones_like(self.logits[:, 0], dtype=torch.bool)
        for sign in (1, -1):
            slope = torch.linspace(-1, 1, self.logits.shape[1], dtype=torch.float32, device="cpu")
            slope = slope.to(self.logits)
            other = choose(self.logits + sign * NUDGE * slope, top_k)[0]
            clear &= (other.sort().values == expected_ids.sort().values).all(1)
        (ids, order), (expected_ids, expected_order) = self.ids.sort(), expected_ids.sort()
        if int(clear.sum()) < len(clear) // 2 or bool((ids != expected_ids)[clear].any()):
            return None
        actual, expected = self.weights.gather(1, order), expected.gather(1, expected_order)
        if form.output_scale is not None:
            expected = expected * self.vectors[form.output_scale][expected_ids]
        ratio = (actual / expected)[clear].double()
        literals = {literal for literal in self.literals if literal and math.isfinite(literal)}
        for scaling in sorted({1.0} | literals | {1 / literal for literal in literals}):
            if bool(((ratio - scaling).abs() <= ROUNDINGS * abs(scaling)).all()):
                routing = form.routing._replace(scaling=scaling) if form.routing else None
                return dataclasses.replace(form, routing=routing)
        return None
