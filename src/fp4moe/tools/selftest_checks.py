"""What `fp4moe selftest` checks of one layer, through FusedExperts and the operators that route.

A check compares with the definition in fp4moe.reference, or with the same kernel called in another
way. The layer is made so that each scale of its format shows in the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..activations import get_activation
from ..arguments import MoeFromLogitsArguments, Settings
from ..errors import UnsupportedError
from ..experts import ExpertWeights
from ..kernels import Routing, get_kernel
from ..routing import route
from ..testing import relative_error
from .selftest_subject import BF16_ROUNDING, Subject

__all__ = ["FAILED", "NOT_SUPPORTED", "OK", "SKIPPED", "Check", "Outcome", "checks"]

OK, FAILED, NOT_SUPPORTED, SKIPPED = "ok", "FAILED", "not supported", "skipped"

# One kernel called in two ways: at most four roundings differ, sqrt(4) = 2, and a margin of 2.
SAME_KERNEL = 4 * BF16_ROUNDING
# The worst token, relative to the RMS of all: 0.2 stays below 0.35, one of 8 experts lost.
TOKEN_FACTOR = 4
# Global scales shrink, so that the calibrated activation scales stay wide enough. Activation scales
# shrink until E4M3 block scales saturate: elsewhere a power of two would cancel.
FACTORS = {
    "gate_up.global_scale": (0.5, 0.8, 0.65, 0.35),
    "down.global_scale": (0.35, 0.65, 0.8, 0.5),
    "hidden_scale": (2.0**-3,),
    "intermediate_scale": (2.0**-4, 2.0**-6, 2.0**-5),
}
# Formats without a global scale: of block scales. What is added to a byte is a power of two.
BLOCK_FACTORS = {
    "gate_up.block_scale": FACTORS["gate_up.global_scale"],
    "down.block_scale": FACTORS["down.global_scale"],
}
BLOCK_STEPS = {"gate_up.block_scale": (-1, 0, -2, -3), "down.block_scale": (-3, -2, 0, -1)}


class Outcome(NamedTuple):
    """What one check found; error and limit are relative RMS unless `note` says what is counted."""

    verdict: str
    error: float | None = None
    limit: float | None = None
    note: str = ""


class Check(NamedTuple):
    """One row of the table, to be run."""

    name: str
    tokens: int
    run: Callable[[], Outcome]


def checks(subject: Subject) -> Iterator[Check]:
    """Yield every check of a layer, in the order of the table.

    Of an activation with parameters without biases only the numbers: all else hangs on no formula.
    """
    if not (subject.weights.biased or get_activation(subject.weights.activation).plain):
        for tokens in filter(None, subject.tokens):
            yield Check("numbers", tokens, functools.partial(numbers, subject, tokens))
        return
    for tokens in subject.tokens:
        yield Check("numbers", tokens, functools.partial(numbers, subject, tokens))
        if tokens:
            run = functools.partial(finite_and_not_zero, subject, tokens)
            yield Check("finite, not zero", tokens, run)
    named: dict[str, Callable[[Subject], Outcome]] = {
        "one expert for all": one_expert_for_all,
        "ids without expert": ids_without_expert,
        "expert halves": expert_halves,
        "gate and up exchanged": exchanged,
        **{name: functools.partial(scale_followed, name=name) for name in scales_of(subject)},
        "float16": functools.partial(other_dtype, dtype=torch.float16),
        "float32, strided": functools.partial(other_dtype, dtype=torch.float32),
        "softmax_topk fused": functools.partial(fused_routing, method="softmax_topk"),
        "sigmoid_topk fused": functools.partial(fused_routing, method="sigmoid_topk"),
        "weights restored": restored,
        "CUDA graph": cuda_graph,
    }
    for name, check in named.items():
        yield Check(name, subject.probe, functools.partial(check, subject))


def scales_of(subject: Subject) -> list[str]:
    """Return the names of the scales that the layer's format stores."""
    format = subject.weights.number_format
    static = format.activation_range is not None
    weights = [name for name in FACTORS if name.endswith("global_scale")]
    activations = [name for name in FACTORS if name not in weights]
    return [*(weights if format.globally_scaled else BLOCK_FACTORS), *(activations * static)]


def numbers(subject: Subject, tokens: int) -> Outcome:
    """Compare with the definition; of no tokens, shape and dtype."""
    inputs = subject.inputs(tokens)
    expected = subject.expected(subject.weights, *inputs)
    return compare(subject.module(*inputs), expected, subject.limit)


def finite_and_not_zero(subject: Subject, tokens: int) -> Outcome:
    """Count tokens whose output is not finite, or all zero although experts were chosen."""
    out = subject.module(*subject.inputs(tokens))
    bad = ~out.isfinite().all(1) | (out == 0).all(1)
    return count(int(bad.sum()), "tokens with no, an infinite or an undefined output")


def one_expert_for_all(subject: Subject) -> Outcome:
    """Send every token to the last expert, its other choices to nobody."""
    hidden, ids, weights = subject.inputs(subject.probe, seed=1)
    ids = torch.full_like(ids, -1)
    ids[:, -1] = subject.weights.num_experts - 1
    expected = subject.expected(subject.weights, hidden, ids, weights)
    return compare(subject.module(hidden, ids, weights), expected, subject.limit)


def ids_without_expert(subject: Subject) -> Outcome:
    """Give -1 and E as ids: they contribute nothing, and a token with no other is exactly zero."""
    hidden, ids, weights = subject.inputs(subject.probe, seed=2)
    none = torch.tensor([-1, subject.weights.num_experts], dtype=ids.dtype, device=ids.device)
    ids[0::4], ids[1::4] = none[0], none[1]
    ids[2::4, -1], ids[3::4, 0] = none[0], none[1]
    expected = subject.expected(subject.weights, hidden, ids, weights)
    out = subject.module(hidden, ids, weights)
    unrouted = torch.isin(ids, none).all(1)
    wrong = count(int((out[unrouted] != 0).any(1).sum()), "tokens without expert are not zero")
    return wrong if wrong.verdict == FAILED else compare(out, expected, subject.limit)


def expert_halves(subject: Subject) -> Outcome:
    """Sum the outputs of two halves of the experts; a token of the other half is exactly zero."""
    weights, local = subject.weights, subject.weights.local_experts
    if local == 1:
        return Outcome(SKIPPED, note="one expert cannot be split")
    split = local // 2
    hidden, ids, routing_weights = subject.inputs(subject.probe, seed=3)
    # A third of the tokens each: first half only, second half only, both.
    ids[0::3] = torch.where(ids[0::3] < split, ids[0::3], -1)
    ids[1::3] = torch.where(ids[1::3] >= split, ids[1::3], -1)
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for first, last in ((0, split), (split, local)):
        half = subject.fused(weights.slice_experts(first, last))
        out = half(hidden, ids, routing_weights)
        elsewhere = ((ids < first) | (ids >= last)).all(1)
        wrong = count(
            int((out[elsewhere] != 0).any(1).sum()), "tokens of the other half are not zero"
        )
        if wrong.verdict == FAILED:
            return wrong
        total += out
    whole = subject.module(hidden, ids, routing_weights)
    return compare(total, whole.float(), SAME_KERNEL)


def exchanged(subject: Subject) -> Outcome:
    """Exchange gate and up: the kernel follows, and without it is far from that definition."""
    weights = subject.weights
    if not weights.gated or weights.activation == "identity":
        return Outcome(SKIPPED, note="gate and up do the same" if weights.gated else "no gate")

    tensors = weights.tensors()
    for name in ("gate_up.packed", "gate_up.block_scale"):
        # As bytes: few operators know float8.
        swapped = tensors[name].view(torch.uint8).roll(tensors[name].shape[1] // 2, 1)
        tensors[name] = swapped.view(tensors[name].dtype)
    other = ExpertWeights.from_tensors(tensors, weights.metadata())
    inputs = subject.inputs(subject.probe, seed=4)
    expected = subject.expected(other, *inputs)
    distance = relative_error(subject.module(*inputs), expected)
    if not distance > 2 * subject.limit:
        return Outcome(FAILED, distance, 2 * subject.limit, "computes the exchanged layer")
    return compare(subject.fused(other)(*inputs), expected, subject.limit)


def scale_followed(subject: Subject, name: str) -> Outcome:
    """Change one scale and prepare again: the kernel follows the definition."""
    weights = subject.weights
    tensors = weights.tensors()
    tensors[name] = changed(tensors[name], name)
    other = ExpertWeights.from_tensors(tensors, weights.metadata())
    inputs = subject.inputs(subject.probe, seed=5)
    expected = subject.expected(other, *inputs)
    try:
        fused = subject.fused(other)
    except UnsupportedError as refusal:  # gate and up with scales of their own, beside a limit
        return Outcome(NOT_SUPPORTED, note=str(refusal))
    outcome = compare(fused(*inputs), expected, subject.limit)
    if "." in name or subject.quantizes_activations:
        change = relative_error(subject.expected(weights, *inputs), expected)
        if not change > 2 * subject.limit:
            return Outcome(FAILED, change, 2 * subject.limit, "the change does not show: no test")
    return outcome


def changed(scale: torch.Tensor, name: str) -> torch.Tensor:
    """Return a scale with a factor for each expert and row, so also for gate and for up."""
    in_steps = scale.dtype == torch.uint8
    values = BLOCK_STEPS[name] if in_steps else (FACTORS | BLOCK_FACTORS)[name]
    numbers = functools.partial(torch.arange, dtype=torch.int64, device=scale.device)
    index = numbers(len(scale))
    if scale.dim() == 3:
        index = (index[:, None] + numbers(scale.shape[1]))[..., None]
    dtype = torch.int32 if in_steps else torch.float32
    each = torch.tensor(values, dtype=dtype, device=scale.device)[index % len(values)]
    return (scale.int() + each).clamp(0, 254).to(torch.uint8) if in_steps else scale * each


def other_dtype(subject: Subject, dtype: torch.dtype) -> Outcome:
    """Pass hidden in another dtype; float32 also as a view with other strides."""
    hidden, ids, weights = subject.inputs(subject.probe, seed=6)
    hidden = hidden.to(dtype)
    if dtype == torch.float32:
        hidden = hidden.t().contiguous().t()
    expected = subject.expected(subject.weights, hidden, ids, weights)
    return compare(subject.module(hidden, ids, weights), expected, subject.limit)


def fused_routing(subject: Subject, method: str, seed: int = 7) -> Outcome:
    """Compare choices of experts with torch's: choose_experts', and the kernel's own if it has one.

    softmax_topk comes with an output scale and, for every second token, negative logits only;
    sigmoid_topk with a bias and a scaling factor.
    """
    softmax, weights = method == "softmax_topk", subject.weights
    routing = Routing(method, subject.top_k, scaling=1.0 if softmax else 2.5)
    generator = subject.generator(seed)
    uniform = functools.partial(
        torch.rand, generator=generator, dtype=torch.float32, device=weights.device
    )
    bias = uniform(0 if softmax else weights.num_experts) - 0.5
    logits = clear_logits(subject, bias, generator)
    if softmax:
        logits[1::2] -= logits[1::2].amax(1, keepdim=True) + 1
    scale = uniform(weights.num_experts if softmax else 0) + 0.5
    hidden, module = subject.hidden[: subject.probe], subject.module
    chosen = torch.ops.fp4moe.choose_experts.default(logits, bias, scale, *routing)
    expected = module(hidden, *route(logits, bias, routing, scale))
    outcome = compare(module(hidden, *chosen), expected, SAME_KERNEL)
    reasons = get_kernel(subject.kernel).reasons_not_to_route(weights.layer(subject.top_k), routing)
    if outcome.verdict == FAILED:
        return outcome
    if reasons:
        return Outcome(NOT_SUPPORTED, note="; ".join(reasons))
    settings = Settings.of_layer(module.prepared.layer, module.kernel)
    given = MoeFromLogitsArguments(
        hidden, logits, bias, module.prepared.operands, routing, settings
    )
    inside = given.operator(*given.flat())
    return compare(inside, module(hidden, *route(logits, bias, routing)), SAME_KERNEL)


def clear_logits(subject: Subject, bias: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return [T, E] logits with a wide gap behind the last chosen expert: nobody breaks ties."""
    shape = (8 * subject.probe, subject.weights.num_experts)
    logits = torch.randn(shape, generator=generator, dtype=torch.float32, device=bias.device)
    score = torch.sigmoid(logits) + bias if bias.numel() else logits
    ranked = score.sort(1, descending=True).values
    gap = ranked[:, subject.top_k - 1] - ranked[:, min(subject.top_k, shape[1] - 1)]
    return logits[gap.argsort(descending=True)[: subject.probe]]


def restored(subject: Subject) -> Outcome:
    """Undo the preparation: the logical weights, bit for bit."""
    back, wanted = subject.module.weights, subject.weights
    if back.metadata() != wanted.metadata():
        return Outcome(FAILED, note=f"metadata {back.metadata()} is not {wanted.metadata()}")
    got = back.tensors()
    wrong = [
        name
        for name, tensor in wanted.tensors().items()
        if got[name].shape != tensor.shape
        or not torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))
    ]
    return count(len(wrong), f"tensors differ: {', '.join(wrong)}")


def cuda_graph(subject: Subject) -> Outcome:
    """Capture a call, replay it with other inputs, compare with a plain call."""
    if subject.hidden.device.type != "cuda":
        return Outcome(SKIPPED, note="no CUDA")
    static = [tensor.clone() for tensor in subject.inputs(subject.probe, seed=8)]
    inputs = subject.inputs(subject.probe, seed=9)
    eager = subject.module(*inputs)
    # Libraries load on first use, which a capture forbids: once on a stream of its own.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        subject.module(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = subject.module(*static)
    for old, new in zip(static, inputs, strict=True):
        old.copy_(new)
    graph.replay()
    return compare(out, eager, SAME_KERNEL)


def compare(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> Outcome:
    """Judge the relative RMS, and the worst token against TOKEN_FACTOR times the limit."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, want = (f"{t.dtype} {list(t.shape)}" for t in (actual, expected))
        return Outcome(FAILED, note=f"got {got}, not {want}")
    if not expected.numel():
        return Outcome(OK)
    difference, wanted = actual.float() - expected.float(), expected.float()
    scale = float(wanted.norm())
    if not scale > 0:
        return count(int((difference != 0).any(1).sum()), "tokens are not zero")
    error = float(difference.norm()) / scale
    worst = float(difference.norm(dim=1).max()) / scale * len(wanted) ** 0.5
    # A NaN is within no limit.
    passed = error <= limit and worst <= TOKEN_FACTOR * limit
    return Outcome(OK if passed else FAILED, error, limit, f"worst token {worst:.2g}")


def count(number: int, what: str) -> Outcome:
    """Judge a number that must be 0."""
    return Outcome(FAILED, number, 0, f"{number} {what}") if number else Outcome(OK, 0, 0)
