"""Which form a block around a ModuleList of expert MLPs computes.

Decided on a float32 twin of the block, whose experts are element-wise probes and whose other
Linears are random: every form gives other numbers there, whatever the block's own dtype and
weights. The twin runs the block's own forward. A last run of the block itself must agree.
Not handled: experts that choose tokens, router noise, auxiliary losses.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..activations import get_activation
from ..random_floats import random_normal
from ..reference import sum_over_experts
from .block import VERIFY_LIMIT
from .module_list_block import BlockForm, FusedMoeBlock
from .named_activation import named_activation, rms_error

__all__ = ["FloatExperts", "confirm_form", "find_form", "identify_expert"]

TOKENS = 5


class FloatExperts(nn.Module):
    """The definition on the experts' own Linears in float32, called as `FusedExperts` is."""

    def __init__(self, experts: Sequence[nn.Module], roles: dict[str, str], activation: str):
        super().__init__()
        self.parts = [{role: getattr(e, name) for role, name in roles.items()} for e in experts]
        self.activation = get_activation(activation)

    def forward(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts to [T, H]."""
        x = hidden.float()

        def apply(expert: int, token: torch.Tensor | slice) -> torch.Tensor:
            part, rows = self.parts[expert], x[token]
            gate = _float_linear(part["gate"], rows) if "gate" in part else None
            y = self.activation.combine(_float_linear(part["up"], rows), gate)
            return _float_linear(part["down"], y)

        out = sum_over_experts(expert_ids, routing_weights, 0, len(self.parts), apply)
        return torch.zeros_like(hidden) if out is None else out.to(hidden.dtype)


class _Probe(nn.Linear):
    """Stands for a Linear of any size: x * factor, reversed along the features if `flip`."""

    def __init__(self, factor: float, flip: bool, device: torch.device):
        super().__init__(1, 1, bias=False, device=device, dtype=torch.float32)
        self.factor, self.flip = factor, flip

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (input.flip(-1) if self.flip else input) * self.factor


class _Part(_Probe):
    """Stands for a Linear: one half of the features, or for `which` None all of them twice."""

    def __init__(self, which: int | None):
        super().__init__(1.0, False, torch.device("cpu"))
        self.which = which

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.which is None:
            return torch.cat((input, input), -1)
        return input.chunk(2, -1)[self.which]


def _float_linear(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(linear, _Probe):
        return linear(x)
    bias = linear._parameters.get("bias")
    weight = linear.get_parameter("weight").float()
    return F.linear(x, weight, None if bias is None else bias.float())


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module so that replacing its children or tensors leaves the original alone."""
    clone = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        clone.__dict__[table] = dict(module.__dict__[table])
    return clone


def _probe_expert(
    expert: nn.Module, roles: dict[str, str], factors: Sequence[float], device: torch.device
) -> nn.Module:
    clone = _shallow(expert)
    first = "gate" if "gate" in roles else "up"
    for role, name in roles.items():
        factor = {first: factors[0], "down": factors[1]}.get(role, 1.0)
        clone._modules[name] = _Probe(factor, role == "up" and first == "gate", device)
    return clone


def identify_expert(expert: nn.Module, roles: dict[str, str]) -> tuple[str | None, str]:
    """Run an expert's own forward on element-wise Linears: (activation, "") or (None, reason)."""
    probe, gated = _shallow(expert), "gate" in roles
    for role, name in roles.items():
        probe._modules[name] = _Part({"gate": 0, "up": 1}.get(role))

    def combine(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        # The input holds gate and up side by side; the output what goes into down, twice.
        result = probe(torch.cat((up if gate is None else gate, up), -1))
        if result.shape != (1, 2 * up.shape[1]):
            raise ValueError(f"a result of shape {list(result.shape)} for [1, {2 * up.shape[1]}]")
        return result[:, : up.shape[1]]

    try:
        with torch.no_grad():
            found, why = named_activation(combine, gated)
    except Exception as error:  # the model's code may raise anything
        return None, f"whose forward cannot be asked for its numbers: {error}"
    return found, f"whose inner function {why}" if why else ""


def _record_calls(router: nn.Module, calls: list) -> nn.Module:
    clone, inner = _shallow(router), router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return inner(*args, **kwargs)

    clone.__dict__["forward"] = forward
    return clone


def _random(generator: torch.Generator, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    return random_normal(generator, tuple(shape)).to(device)


def _make_twin(
    block: nn.Module, experts: str, router: str, roles: dict[str, str], generator: torch.Generator
) -> nn.Module:
    twin = _shallow(block)
    device = next(block._modules[experts].parameters()).device  # type: ignore[union-attr]
    for name, child in block.named_children():
        if name == experts:
            factors = 1.0 + 0.5 * _random(generator, (len(child), 2), device)  # type: ignore[arg-type]
            items = zip(child, factors.tolist(), strict=True)  # type: ignore[call-overload]
            copied: nn.Module = nn.ModuleList(_probe_expert(e, roles, f, device) for e, f in items)
        elif name != router and not isinstance(child, nn.Linear) and _holds_weights(child):
            copied = _Probe(0.7, True, device)
        else:
            copied = copy.deepcopy(child).float()
            if isinstance(child, nn.Linear):
                for p in copied.parameters():
                    p.copy_(1.5 * _random(generator, p.shape, device) / p.shape[-1] ** 0.5)
        twin._modules[name] = copied
    for name, parameter in twin.named_parameters(recurse=False):
        random = 0.3 * _random(generator, parameter.shape, device)
        twin._parameters[name] = nn.Parameter(random, requires_grad=False)
    for name, buffer in twin.named_buffers(recurse=False):
        if buffer.is_floating_point():
            twin._buffers[name] = 0.3 * _random(generator, buffer.shape, device)
    return twin


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _children(block: nn.Module, width: int, experts: str, router: str) -> tuple[list, list, list]:
    """Return shared experts, shared gates, and latent pairs that the block may have."""
    rest = {n: c for n, c in block.named_children() if n not in (experts, router)}
    linears = {n: c for n, c in rest.items() if isinstance(c, nn.Linear)}
    shared = [n for n, c in rest.items() if n not in linears and _holds_weights(c)]
    gates = [n for n, c in linears.items() if c.out_features == 1]
    pairs = [
        (a, b)
        for (a, x), (b, y) in itertools.permutations(linears.items(), 2)
        if x.out_features == y.in_features == width and x.in_features == y.out_features
    ]
    return shared, gates, pairs


def _routings(
    block: nn.Module, router: nn.Module, result: Any, experts: int, named: bool
) -> Iterator[dict]:
    """Yield the fields of every routing; `named`: only top_k that an attribute is called."""
    owners = (getattr(o, "__dict__", {}) for o in (block, router, getattr(block, "config", None)))
    fields = [(n, v) for owner in owners for n, v in owner.items() if type(v) in (int, float)]
    factors = [1.0, *sorted({float(v) for n, v in fields if "scal" in n and v > 0} - {1.0})]
    if not isinstance(result, torch.Tensor):
        yield from _given_routings(result, factors)
        return
    names = [n for n, _ in fields if n == "k" or "top" in n or "per_tok" in n]
    numbers = {v for n, v in fields if type(v) is int and 1 <= v <= experts and n in names}
    everything = set(range(1, min(experts, 16) + 1)) - numbers
    tensors = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    biases = [("sigmoid", n) for n, t in tensors if t.shape == (experts,)]
    kinds: list[tuple[str, str | None]] = [("softmax", None), ("sigmoid", None), *biases]
    options = (sorted(numbers if named else everything), kinds, (True, False), factors)
    for top_k, (routing, correction), renormalize, scaling in itertools.product(*options):
        choice = {"routing": routing, "correction": correction, "top_k": top_k}
        yield {**choice, "renormalize": renormalize, "scaling": scaling}


def _given_routings(result: Any, factors: list[float]) -> Iterator[dict]:
    if not isinstance(result, (tuple, list)):
        return
    tensors = [(i, t) for i, t in enumerate(result) if isinstance(t, torch.Tensor) and t.ndim > 1]
    for (i, ids), (j, weights) in itertools.permutations(tensors, 2):
        integers = ids.dtype in (torch.int32, torch.int64)
        if integers and weights.is_floating_point() and ids.shape == weights.shape:
            for scaling in factors:
                given = {"routing": "given", "given": (i, j), "top_k": ids.shape[-1]}
                yield {**given, "scaling": scaling}


def _predict(block: nn.Module, form: BlockForm, experts: nn.Module, hidden: torch.Tensor) -> Any:
    try:
        return FusedMoeBlock(block, form, experts)(hidden)
    except (RuntimeError, ValueError):
        # A form whose shapes do not fit predicts nothing, hence fits nothing.
        return hidden.new_empty(0), hidden.new_empty(0)


def _output(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def find_form(
    block: nn.Module, experts: str, router: str, roles: dict[str, str], activation: str, width: int
) -> tuple[BlockForm | None, str]:
    """Return (the one form that computes what the block's forward does, "") or (None, reason)."""
    generator = torch.Generator("cpu").manual_seed(0)
    shared, shared_gates, latents = _children(block, width, experts, router)
    hidden_size = getattr(block, latents[0][0]).in_features if latents else width
    try:
        twin = _make_twin(block, experts, router, roles, generator)
        runs, form = _run_twin(twin, experts, router, hidden_size, generator)
    except Exception as error:  # the model's code may raise anything
        return None, f"its forward cannot be asked for its numbers: {error}{_hint(block)}"
    if isinstance(form, str):
        return None, form + _hint(block)
    adds = [(None, None), *itertools.product(shared, [None, *shared_gates])]
    around = list(itertools.product(adds, [*latents, None] if hidden_size == width else latents))
    twin_experts: Any = getattr(twin, experts)
    definition = FloatExperts(list(twin_experts), roles, activation)
    hidden, result = runs[0]
    tokens = hidden.reshape(-1, hidden_size)
    scores = getattr(twin, router)(tokens if form.router_rank < 3 else tokens.unsqueeze(0))
    errors: dict[BlockForm, float] = {}
    limit = VERIFY_LIMIT[torch.float32]
    args = (block, getattr(twin, router), scores, len(twin_experts))
    for named in (True, False):
        if errors and min(errors.values()) <= limit:
            break
        for routing, ((name, gate), latent) in itertools.product(_routings(*args, named), around):
            options = {**routing, "shared": name, "shared_gate": gate, "latent": latent}
            guess = dataclasses.replace(form, **options)
            predicted = _predict(twin, guess, definition, hidden)
            errors[guess] = rms_error(_output(result), _output(predicted))
    if not errors:
        return None, f"its {router} returns neither logits nor expert ids with their weights"
    fitting = {}
    passed = [guess for guess, error in errors.items() if error <= limit]
    for guess in passed:
        results = [_predict(twin, guess, definition, hidden) for hidden, _ in runs]
        pairs = list(zip((result for _, result in runs), results, strict=True))
        errors[guess] = max(rms_error(_output(x), _output(y)) for x, y in pairs)
        if errors[guess] <= limit:
            fitting[guess] = torch.cat([_output(result).reshape(-1) for result in results])
            if form.logits_rank and not max(rms_error(x[1], y[1]) for x, y in pairs) <= limit:
                return None, "its second result is not what its router returns"
    closest = min(passed or errors, key=lambda guess: errors[guess])
    if not fitting:
        return None, (
            f"it computes none of the forms that are known; closest is {closest} with relative "
            f"error {errors[closest]:.2g}, limit {limit:g}{_hint(block)}"
        )
    best = next(iter(fitting))
    # Forms that are equal in exact arithmetic (top_k = 1 renormalised, ...) count as one.
    others = [g for g, result in fitting.items() if rms_error(result, fitting[best]) > limit / 10]
    if others:
        return None, f"its numbers cannot tell {best} from {others[0]}"
    return best, ""


def _run_twin(
    twin: nn.Module, experts: str, router: str, hidden_size: int, generator: torch.Generator
) -> tuple[list[tuple[torch.Tensor, Any]], BlockForm | str]:
    """Return (inputs and results of the twin, what can be read off them, or why not)."""
    calls: list = []
    original, twin_list = getattr(twin, router), getattr(twin, experts)
    device = next(twin_list.parameters()).device
    before = _attributes(twin)
    runs: list[tuple[torch.Tensor, Any]] = []
    refusal, rank = "", 0
    # One token leaves experts idle, many exceed a capacity, large ones reach a clamp.
    for shape, size in (((1, TOKENS), 1), ((TOKENS,), 1), ((1, 1), 1), ((2, 64), 1), ((3, 2), 8)):
        hidden = size * _random(generator, (*shape, hidden_size), device)
        twin._modules[router] = _record_calls(original, calls)
        try:
            result = twin(hidden.clone())
        except Exception as error:  # the model's code may raise anything
            # Kept as text: an exception would keep this frame, and with it the block, alive.
            refusal = refusal or str(error)
            continue
        finally:
            twin._modules[router] = original
        if not runs and calls:
            rank = calls[-1][0][0].ndim if calls[-1][0] else 0
        runs.append((hidden, result))
    if not runs:
        return runs, f"its forward cannot be asked for its numbers: {refusal}"
    if any(len(args) != 1 or kwargs for args, kwargs in calls):
        return runs, f"its forward gives {router} more than the hidden states, or by keyword"
    if not rank and not isinstance(original, nn.Linear):
        return runs, f"its forward does not call {router}"
    now = _attributes(twin)
    if names := [k for k in now if k not in before or now[k] is not before[k]]:
        return runs, f"its forward sets {', '.join(names)}, which a fused block would not"
    results = [result for _, result in runs]
    form = BlockForm(experts, router, "softmax", 1, router_rank=rank)
    if all(isinstance(result, torch.Tensor) for result in results):
        return runs, form
    if all(_is_pair(result) for result in results):
        return runs, dataclasses.replace(form, logits_rank=results[0][1].ndim)
    sized = isinstance(results[0], (tuple, list))
    what = type(results[0]).__name__ + (f" of {len(results[0])}" if sized else "")
    return runs, f"its forward returns a {what}, neither a tensor nor (output, router logits)"


def _is_pair(result: Any) -> bool:
    pair = isinstance(result, tuple) and len(result) == 2
    return pair and all(isinstance(tensor, torch.Tensor) for tensor in result)


def _hint(block: nn.Module) -> str:
    return "; it is in training mode, call eval() first" if block.training else ""


def _attributes(module: nn.Module) -> dict[str, Any]:
    tables = (vars(module), module._parameters, module._buffers)
    return {k: v for table in tables for k, v in table.items() if not k.startswith("_")}


def confirm_form(
    block: nn.Module, form: BlockForm, experts: FloatExperts, hidden_size: int
) -> tuple[BlockForm, list[str]]:
    """Run the block itself on five tokens; return the form with its router's dtype, and reasons."""
    weight = experts.parts[0]["up"].weight
    generator = torch.Generator("cpu").manual_seed(0)
    calls: list = []
    clone = _shallow(block)
    clone._modules[form.router] = _record_calls(getattr(block, form.router), calls)
    refusal = ""
    for shape in ((1, TOKENS, hidden_size), (TOKENS, hidden_size)):
        hidden = _random(generator, shape, weight.device).to(weight.dtype)
        try:
            actual = _output(clone(hidden.clone()))
            break
        except Exception as raised:  # the model's code may raise anything
            refusal = refusal or str(raised)
    else:
        return form, [f"its forward refuses {weight.dtype} tokens: {refusal}"]
    if calls and (dtype := calls[-1][0][0].dtype) != weight.dtype:
        form = dataclasses.replace(form, router_dtype=dtype)
    expected = _output(_predict(block, form, experts, hidden))
    difference, limit = rms_error(actual, expected), VERIFY_LIMIT[weight.dtype]
    if difference <= limit:
        return form, []
    return form, [
        f"it does not compute {form} with its own weights: relative error {difference:.2g} on "
        f"random tokens, limit {limit:g}"
    ]
