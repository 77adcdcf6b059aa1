"""Ask a region's numbers what it computes.

The region runs once in float32 on random tokens and random weights of its own sizes, and is
compared with the plain
definition under every hypothesis: order of gate and up, interleaving, storage transposed or not,
activation. Exactly one must fit. The experts' weights are overlapping windows of one small buffer,
so that 128 experts cost the memory of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fp4moe.activations import ACTIVATIONS, identify_activation
from fp4moe.experts import GATE_UP_LAYOUTS, split_gate_up

from .locate import Region, meta_value

__all__ = ["Hypothesis", "trust_region", "verify_region"]

# Relative RMS limit. Float32 sums of H terms err by about sqrt(H) * 2^-24 = 3e-6 at H = 2816; the
# closest pair of hypotheses, the two GELUs, differ by about 3e-4.
LIMIT = 3e-5
# Rows of the output that are compared.
COMPARED_TOKENS = 16
# Distance of two experts' windows; odd, so that rows of different experts never coincide.
EXPERT_SHIFT = 97


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """What a region may compute.

    Attributes:
        gated: whether the first weight holds gate and up. layout: the order of its rows, None when
            not gated.
        transposed: the weights are stored [E, H, ...] and [E, I, H]. activation: a name of
            ACTIVATIONS.
    """

    gated: bool
    layout: str | None
    transposed: bool
    activation: str

    def __str__(self) -> str:
        form = f"gated ({self.layout}) " if self.gated else ""
        return f"{form}{self.activation}{', transposed weights' if self.transposed else ''}"


def verify_region(gm: fx.GraphModule, region: Region) -> tuple[Hypothesis | None, str]:
    """Return the one hypothesis that fits and "", or None and the reason with the closest one."""
    with torch.inference_mode(False), torch.no_grad(), _undisturbed(region):
        probes = _probes(region)
        versions = {role: probe._version for role, probe in probes.items()}
        try:
            actual = _Float32Region(gm, region, probes).compute()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return None, f"it does not run by itself on random numbers: {error}"
        changed = [role for role, probe in probes.items() if probe._version != versions[role]]
        if changed:
            return None, f"it changes its input {', '.join(changed)} in place"
        errors = {h: _error(h, probes, actual) for h in _hypotheses(probes)}
    if not errors:
        shapes = f"{list(probes['first'].shape)} and {list(probes['down'].shape)}"
        return (
            None,
            f"weights {shapes} fit no gated or plain form for hidden size "
            f"{probes['hidden'].shape[1]}",
        )
    fitting = [h for h, error in errors.items() if error <= LIMIT]
    if len(fitting) == 1:
        return fitting[0], ""
    if fitting:
        return None, f"it fits more than one form: {'; '.join(map(str, fitting))}"
    closest = min(errors, key=errors.__getitem__)
    return None, (
        f"its numbers fit no known form; closest is {closest} with relative error "
        f"{errors[closest]:.2g}, limit {LIMIT:g}"
    )


def trust_region(region: Region) -> tuple[Hypothesis | None, str]:
    """Return the form that names and shapes suggest, without running it; or None and the reason.

    Assumes gate first and concatenated, and takes the activation from the class of `act_fn`.
    """
    assert region.first and region.down and region.hidden
    classes = {
        cls
        for node in region.nodes
        for path, cls in node.meta.get("nn_module_stack", {}).values()
        if path.endswith(".act_fn")
    }
    names = {_default_activation(cls) for cls in classes}
    if len(names) != 1 or None in names:
        return None, "its act_fn module is not recorded in the graph or unknown; use verify=True"
    probes = {
        n: torch.empty(_shape(getattr(region, n)), device="meta")
        for n in ("first", "down", "hidden")
    }
    for form in _hypotheses(probes):
        if form.activation in names and form.layout in (None, "gate_up"):
            return form, ""
    return (
        None,
        f"its weights fit no gated or plain form for hidden size {probes['hidden'].shape[1]}",
    )


def _default_activation(cls: type) -> str | None:
    try:
        return identify_activation(cls())
    except TypeError:
        # Its class needs arguments, which the graph does not record.
        return None


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _shape(node: fx.Node) -> list[int]:
    return [_hint(size) for size in meta_value(node).shape]


def _probes(region: Region) -> dict[str, torch.Tensor]:
    """Random inputs of the region's own sizes, on its own device."""
    generator = torch.Generator().manual_seed(0)
    nodes = region.inputs()
    device = meta_value(nodes["hidden"]).device
    tokens, hidden_size = _shape(nodes["hidden"])
    top_k = _shape(nodes["expert_ids"])[1]
    experts = _shape(nodes["first"])[0]
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    # Distinct experts of each token, as a router gives them.
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    ids = ids if top_k <= experts else torch.randint(experts, (tokens, top_k), generator=generator)
    routing = torch.rand(tokens, top_k, generator=generator) + 0.1
    probes = {
        "hidden": hidden,
        "expert_ids": ids.to(meta_value(nodes["expert_ids"]).dtype),
        "routing_weights": routing,
    }
    for role in ("first", "down"):
        experts, rows, columns = _shape(nodes[role])
        buffer = torch.randn(EXPERT_SHIFT * (experts - 1) + rows * columns, generator=generator)
        # Standard deviation 1.5 before the activation, where its forms differ most.
        buffer *= 1.5 * hidden_size**-0.5
        probes[role] = buffer.as_strided((experts, rows, columns), (EXPERT_SHIFT, columns, 1))
    # as_strided windows survive .to(device) only by a copy; move the buffer instead.
    return {role: _to_device(probe, device) for role, probe in probes.items()}


def _to_device(probe: torch.Tensor, device: torch.device) -> torch.Tensor:
    if probe.ndim != 3 or device.type == "cpu":
        return probe.to(device)
    size = (probe.shape[0] - 1) * EXPERT_SHIFT + probe.shape[1] * probe.shape[2]
    return probe.as_strided((size,), (1,)).to(device).as_strided(probe.shape, probe.stride())


def _hypotheses(probes: dict[str, torch.Tensor]) -> Iterator[Hypothesis]:
    first, down, hidden_size = probes["first"], probes["down"], probes["hidden"].shape[1]
    for transposed in (False, True):
        rows, hidden_in = (first.shape[2], first.shape[1]) if transposed else first.shape[1:]
        intermediate, hidden_out = (
            (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
        )
        if hidden_in != hidden_size or hidden_out != hidden_size:
            continue
        layouts = {2 * intermediate: GATE_UP_LAYOUTS, intermediate: (None,)}.get(rows, ())
        for layout, activation in itertools.product(layouts, ACTIVATIONS):
            # act(gate) * up with the identity is the same in either order.
            if activation == "identity" and layout is not None and layout.startswith("up"):
                continue
            yield Hypothesis(layout is not None, layout, transposed, activation)


def _error(h: Hypothesis, probes: dict[str, torch.Tensor], actual: torch.Tensor) -> float:
    """Relative RMS error of the region against the definition, written out slot by slot."""
    picked = (
        torch.linspace(0, actual.shape[0] - 1, min(COMPARED_TOKENS, actual.shape[0]))
        .long()
        .to(actual.device)
    )
    x, ids = probes["hidden"][picked], probes["expert_ids"][picked].long()
    expected = torch.zeros_like(x)
    for slot in range(ids.shape[1]):
        first = torch.stack([probes["first"][e] for e in ids[:, slot]])
        down = torch.stack([probes["down"][e] for e in ids[:, slot]])
        if h.transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        function = ACTIVATIONS[h.activation].function
        if h.layout is None:
            y = function(torch.einsum("tnh,th->tn", first, x))
        else:
            gate, up = split_gate_up(first, h.layout)
            y = function(torch.einsum("tnh,th->tn", gate, x)) * torch.einsum("tnh,th->tn", up, x)
        expected += probes["routing_weights"][picked, slot, None] * torch.einsum(
            "thn,tn->th", down, y
        )
    return float((actual[picked] - expected).norm() / expected.norm())


class _Float32Region:
    """Runs the region's nodes on the probes, all in float32, casts and grouped_mm included."""

    def __init__(self, gm: fx.GraphModule, region: Region, probes: dict[str, torch.Tensor]):
        self.gm = gm
        self.region = region
        self.values: dict[fx.Node, Any] = {
            node: probes[role] for role, node in region.inputs().items()
        }

    def compute(self) -> torch.Tensor:
        for node in self.region.nodes:
            self.values[node] = self._run(node)
        assert self.region.output is not None
        return self.values[self.region.output]

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values:
            # What is neither a tensor input nor inside is a size.
            self.values[node] = _hint(meta_value(node))
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        if isinstance(meta_value(node), (int, torch.SymInt)):
            return _hint(meta_value(node))
        args: Any = fx.node.map_aggregate(fx.node.map_arg(node.args, self._value), _widen)
        kwargs: Any = fx.node.map_aggregate(fx.node.map_arg(node.kwargs, self._value), _widen)
        if "grouped_mm" in str(getattr(node.target, "__name__", node.target)):
            return _grouped_mm(*args, **kwargs)
        if node.op == "call_method":
            method = "float" if node.target in ("bfloat16", "half") else str(node.target)
            return getattr(args[0], method)(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _widen(value: Any) -> Any:
    return (
        torch.float32
        if value in (torch.bfloat16, torch.float16) and isinstance(value, torch.dtype)
        else value
    )


def _grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: Any = None,
) -> torch.Tensor:
    """torch._grouped_mm for x [S, K] and weight [E, K, N]; rows behind the last offset are NaN."""
    if bias is not None:
        raise ValueError("grouped_mm with a bias, which the operator does not add")
    out = x.new_full((x.shape[0], weight.shape[2]), float("nan"))
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        if stop > start:
            out[start:stop] = x[start:stop] @ weight[expert]
        start = stop
    return out


@contextlib.contextmanager
def _undisturbed(region: Region) -> Iterator[None]:
    """Float32 as it is written, and the caller's random state untouched."""
    assert region.hidden is not None
    device = meta_value(region.hidden).device
    # TF32 and autocast would blur the two GELUs.
    precision = torch.get_float32_matmul_precision()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
