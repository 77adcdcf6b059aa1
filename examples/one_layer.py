"""What both examples do with a model of one MoE layer at its real width.

explain, graph breaks before and after, generation compiled through the backend, replace_moe,
errors, bytes.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from typing import Any

import torch
from transformers import CompileConfig
from transformers.utils import logging as transformers_logging

import fp4moe
from fp4moe.models.replace import find_candidates
from fp4moe.reference import moe_definition, reference, reference_w4a4
from fp4moe.report import format_bytes, format_table
from fp4moe.testing import relative_error

PROMPT_TOKENS = 12
NEW_TOKENS = 6
VOCABULARY = 4096
# Compiles nothing further, so that roundings, and with them tokens, equal those of eager mode.
# Leave it out for the default, inductor.
INNER_BACKEND = "eager"


class Experts:
    """Remembers the last call of an experts module: what goes in and what comes out."""

    def __init__(self, module: torch.nn.Module):
        self.inputs: tuple[torch.Tensor, ...] = ()
        self._hook = module.register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.inputs = tuple(x.detach().clone() for x in inputs)

    def close(self) -> None:
        self._hook.remove()


def count_breaks(
    model: torch.nn.Module, ids: torch.Tensor, backend: Any = "eager"
) -> tuple[str, torch.Tensor]:
    """Compile one forward pass; return "graphs / breaks" and the logits."""
    torch._dynamo.reset()
    graphs = 0

    def counting(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward if backend == "eager" else backend(gm, inputs)

    with torch.no_grad():
        logits = torch.compile(model, backend=counting)(ids).logits
    return f"{graphs} / {graphs - 1}", logits


def generate(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> list[int]:
    """Return the new tokens of a greedy generation with a static cache."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
        # generate() runs the prefill in eager, unless it comes in chunks: then it is compiled too.
        prefill_chunk_size=PROMPT_TOKENS,
        **options,
    )
    return out[0, ids.shape[1] :].tolist()


def layer_errors(candidate: Any, inputs: tuple, weights: fp4moe.ExpertWeights) -> dict[str, float]:
    """Errors of the layer's output on real inputs against its float weights in float32."""
    stacked, down = (w.detach() for w in candidate.parameters.values())
    gate, up = stacked.chunk(2, dim=1) if weights.gated else (None, stacked)
    exact = moe_definition(*inputs, up=up, down=down, gate=gate, activation=weights.activation)
    hidden, ids, routing = inputs
    return {
        "W4A16 (kernel reference)": relative_error(reference(hidden, weights, ids, routing), exact),
        "W4A4 (kernel reference_w4a4)": relative_error(
            reference_w4a4(hidden, weights, ids, routing), exact
        ),
    }


def run(model: torch.nn.Module) -> None:
    """Show everything for one model; raises where a promise does not hold."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # transformers tells of each kernel library that is not installed (causal_conv1d, mamba_ssm).
    transformers_logging.set_verbosity_error()
    # transformers' grouped_mm asks cached functions for versions; dynamo tells of each.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    ids = torch.randint(1, VOCABULARY, (1, PROMPT_TOKENS), device=device)
    before = fp4moe.explain(model)
    print(f"{before}\n")

    candidate = find_candidates(model)[0]
    experts = Experts(candidate.module)
    with torch.no_grad():
        float_logits = model(ids).logits
    experts.close()

    options = {"inner_backend": INNER_BACKEND}
    backend = functools.partial(fp4moe.backend, options=options)
    rows = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        rows.append([f"Hugging Face, {implementation}", count_breaks(model, ids)[0]])
    breaks, compiled_logits = count_breaks(model, ids, backend)
    rows.append(["fp4moe.backend, grouped_mm", breaks])

    torch._dynamo.reset()
    config = CompileConfig(backend=fp4moe.backend, options=options, fullgraph=True, mode=None)
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
    rows.append(["replace_moe", count_breaks(model, ids)[0]])
    print(format_table(["graphs / breaks of one forward pass", ""], rows))
    with torch.no_grad():
        logits = model(ids).logits
    replaced_tokens = generate(model, ids, disable_compile=True)

    print(
        "\nrelative RMS error of the experts' output against bf16 weights, random Gaussian weights"
    )
    for name, error in errors.items():
        print(f"  {name}: {error:.4f}")
    error = relative_error(logits, float_logits)
    print(f"relative RMS error of the logits, replaced against bf16: {error:.4f}")
    print(
        f"expert weights: {format_bytes(before.nbytes)} -> {format_bytes(after.nbytes)}, "
        f"{before.nbytes / after.nbytes:.2f} times smaller"
    )
    print(f"tokens, bf16:                          {float_tokens}")
    print(f"tokens, compiled with fp4moe.backend:  {compiled_tokens}")
    print(f"tokens, replace_moe in eager:          {replaced_tokens}")
    # Both run the same operator on the same bytes; what is left is bf16 rounding elsewhere (2^-8).
    if not (difference := relative_error(compiled_logits, logits)) < 2**-6:
        raise SystemExit(f"logits of the backend and of replace_moe differ by {difference:.2g}")
    print(f"done in {time.time() - started:.0f} s on {device}")
