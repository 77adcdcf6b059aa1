"""What both examples do with a model of one MoE layer at its real width.

explain -> graph breaks before and after -> compiled generation through the backend -> replace_moe -> errors and bytes.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from transformers import CompileConfig

import fp4moe
from fp4moe.explain import format_bytes, format_table
from fp4moe.reference import moe_definition, reference, reference_w4a4

PROMPT_TOKENS = 12
NEW_TOKENS = 6


class Experts:
    """Remembers the last call of an experts module: what goes in and what comes out."""

    def __init__(self, module: torch.nn.Module):
        self.inputs: tuple[torch.Tensor, ...] = ()
        self._hook = module.register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.inputs = tuple(x.detach().clone() for x in inputs)

    def close(self) -> None:
        self._hook.remove()


def count_breaks(model: torch.nn.Module, ids: torch.Tensor, backend: Any = "eager") -> str:
    """Compile one forward pass; return "graphs / breaks"."""
    torch._dynamo.reset()
    graphs = 0

    def counting(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward if backend == "eager" else backend(gm, inputs)

    with torch.no_grad():
        torch.compile(model, backend=counting)(ids)
    return f"{graphs} / {graphs - 1}"


def generate(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> list[int]:
    """Return the new tokens of a greedy generation with a static cache."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        **options,
    )
    return out[0, ids.shape[1] :].tolist()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def layer_errors(candidate: Any, inputs: tuple, weights: fp4moe.ExpertWeights) -> dict[str, float]:
    """Errors of the layer's output for real inputs against its bf16 weights in float32 arithmetic."""
    stacked, down = (w.detach() for w in candidate.parameters.values())
    gate, up = stacked.chunk(2, dim=1) if weights.gated else (None, stacked)
    exact = moe_definition(*inputs, up=up, down=down, gate=gate, activation=weights.activation)
    hidden, ids, routing = inputs
    return {
        "W4A16 (kernel reference)": relative(reference(hidden, weights, ids, routing), exact),
        "W4A4 (kernel reference_w4a4)": relative(
            reference_w4a4(hidden, weights, ids, routing), exact
        ),
    }


def run(model: torch.nn.Module) -> None:
    """Show everything for one model; raises where a promise does not hold."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # transformers' grouped_mm asks cached functions for versions; dynamo tells of each.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    ids = torch.randint(1, 1000, (1, PROMPT_TOKENS), device=device)
    before = fp4moe.explain(model)
    print(f"{before}\n")

    candidate = fp4moe.replace.find_candidates(model)[0]
    experts = Experts(candidate.module)
    with torch.no_grad():
        float_logits = model(ids).logits
    experts.close()

    # Attention and the rest stay as they are, so the quick inner backend shows all there is to see.
    backend = lambda gm, inputs: fp4moe.backend(gm, inputs, options={"inner_backend": "eager"})  # noqa: E731
    rows = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        rows.append([f"Hugging Face, {implementation}", count_breaks(model, ids)])
    rows.append(["fp4moe.backend, grouped_mm", count_breaks(model, ids, backend)])

    torch._dynamo.reset()
    config = CompileConfig(backend=fp4moe.backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    compiled_tokens = generate(model, ids, compile_config=config)
    float_tokens = generate(model, ids, disable_compile=True)

    weights = fp4moe.ExpertWeights.quantize(
        **{
            "gate_up" if candidate.gated else "up": next(
                iter(candidate.parameters.values())
            ).detach()
        },
        down=candidate.parameters["down_proj"].detach(),
        activation=candidate.activation,
    )
    errors = layer_errors(candidate, experts.inputs, weights)
    del candidate, experts, weights
    torch._dynamo.reset()

    fp4moe.replace_moe(model)
    after = fp4moe.explain(model)
    print(f"{after}\n")
    rows.append(["replace_moe", count_breaks(model, ids)])
    print(format_table(["graphs / breaks of one forward pass", ""], rows))
    with torch.no_grad():
        logits_error = relative(model(ids).logits, float_logits)
    replaced_tokens = generate(model, ids, disable_compile=True)

    print(
        "\nrelative RMS error of the experts' output against bf16 weights, random Gaussian weights"
    )
    for name, error in errors.items():
        print(f"  {name}: {error:.4f}")
    print(f"relative RMS error of the logits, replaced against bf16: {logits_error:.4f}")
    print(
        f"expert weights: {format_bytes(before.nbytes)} -> {format_bytes(after.nbytes)}, "
        f"{before.nbytes / after.nbytes:.2f} times smaller"
    )
    print(f"tokens, bf16:                          {float_tokens}")
    print(f"tokens, compiled with fp4moe.backend:  {compiled_tokens}")
    print(f"tokens, replace_moe in eager:          {replaced_tokens}")
    if compiled_tokens != replaced_tokens:
        raise SystemExit("the compiled and the replaced model generate different tokens")
    print(f"done in {time.time() - started:.0f} s on {device}")
