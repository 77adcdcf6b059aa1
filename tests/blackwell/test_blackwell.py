"""What can be known on a Blackwell GPU only; README.md beside this file says how to run it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from fused_layers import with_biases
from tiny_models import enlarge_experts, gemma4, generate, nemotron_h

from fp4moe.kernels import current_capability
from fp4moe.models.autotune import autotune
from fp4moe.models.replace import replace_moe
from fp4moe.tools.selftest import LAYERS, run_selftest
from fp4moe.tools.selftest_checks import (
    OK,
    SAME_KERNEL,
    compare,
    finite_and_not_zero,
    fused_routing,
    numbers,
)
from fp4moe.tools.selftest_subject import W4A4, make_subject

# Shown, not raised: libraries that only a GPU makes import must not end a rare run.
pytestmark = pytest.mark.filterwarnings("default")
KERNEL = "flashinfer_trtllm"
DEVICE = torch.device("cuda")
CAPABILITY = current_capability()
GOT = ".".join(map(str, CAPABILITY)) if CAPABILITY else "a CPU"
blackwell = pytest.mark.skipif(
    CAPABILITY not in ((10, 0), (10, 3)),
    reason=f"needs compute capability 10.0 or 10.3; got {GOT}",
)
consumer_blackwell = pytest.mark.skipif(
    CAPABILITY not in ((12, 0), (12, 1)),
    reason=f"needs compute capability 12.0 or 12.1; got {GOT}",
)
MODELS = {"gemma4": gemma4, "nemotron_h": nemotron_h}
METHODS = {"Gemma4-26B-A4B": "softmax_topk", "Nemotron-3-Nano-30B": "sigmoid_topk"}


def subject(model, *tokens, kernel=None, hidden_alignment=256, **sizes):
    """One layer of a model on the GPU, random, perhaps with fewer experts."""
    return make_subject(
        kernel or KERNEL,
        {**LAYERS[model], **sizes},
        device=DEVICE,
        tokens=tokens,
        hidden_alignment=hidden_alignment,
    )


def show(row):
    print("  ".join(row.cells()), flush=True)


def check_selftest(kernel, models, **options):
    """Run the whole self-test; the models' layers must be among what was run."""
    report = run_selftest(kernel, device=DEVICE, on_row=show, **options)
    assert report.passed, f"\n{report}"
    done = {row.layer for row in report.rows if row.check == "numbers"}
    assert set(models) <= done, f"\n{report}"
    return report


@blackwell
@pytest.mark.parametrize("hidden_alignment", [128, 256, 512])
def test_selftest(hidden_alignment):
    report = check_selftest(KERNEL, LAYERS, hidden_alignment=hidden_alignment)
    verdicts = {(r.layer, r.check): r.verdict for r in report.rows}
    for model, method in METHODS.items():
        assert verdicts[model, f"{method} fused"] == OK
        assert verdicts[model, "CUDA graph"] == OK


@consumer_blackwell
def test_selftest_of_cutlass():
    check_selftest("flashinfer_cutlass", ["Nemotron-3-Nano-30B"])


def check_parameters_and_biases(kernel, activation):
    """A layer with biases, and limits that are reached, against the definition."""
    plain = subject("Gemma4-26B-A4B", 128, kernel=kernel, num_experts=16)
    weights = dataclasses.replace(
        with_biases(plain.weights),
        activation=activation,
        intermediate_scale=plain.weights.intermediate_scale * 2,
    )
    for tokens in (1, 7, 128):
        inputs = plain.inputs(tokens)
        expected = plain.expected(weights, *inputs)
        outcome = compare(plain.fused(weights)(*inputs), expected, W4A4)
        assert outcome.verdict == OK, (tokens, outcome)
        # Neither is next to nothing.
        for change in ({"activation": "silu"}, {"gate_up_bias": None, "down_bias": None}):
            other = plain.expected(dataclasses.replace(weights, **change), *inputs)
            assert compare(other, expected, W4A4).verdict != OK, change


PARAMETERS = ("silu(alpha=1.702,beta=1,limit=1.5)", "silu(limit=1.5)", "silu(alpha=0.5)")


@blackwell
@pytest.mark.parametrize("activation", PARAMETERS)
def test_parameters_and_biases(activation):
    check_parameters_and_biases(KERNEL, activation)


@pytest.mark.skipif(
    CAPABILITY not in ((10, 0), (10, 3), (12, 0), (12, 1)),
    reason=f"needs compute capability 10.0, 10.3, 12.0 or 12.1; got {GOT}",
)
@pytest.mark.parametrize("activation", [*PARAMETERS, "silu_step(limit=1.5)"])
def test_parameters_and_biases_of_cutlass(activation):
    check_parameters_and_biases("flashinfer_cutlass", activation)


# FlashInfer issue 3168 and vLLM issue 39510: is the padded size right, is the unpadded one?
@blackwell
def test_hidden_2688_alone_and_padded_to_2816_and_3072():
    aligned = {a: subject("Nemotron-3-Nano-30B", 1000, hidden_alignment=a) for a in (128, 256, 512)}
    sizes = {a: s.module.prepared.operands.down_packed.shape[1] for a, s in aligned.items()}
    assert sizes == {128: 2688, 256: 2816, 512: 3072}
    for tokens in (1, 7, 128, 1000):
        inputs = aligned[128].inputs(tokens)
        expected = aligned[128].expected(aligned[128].weights, *inputs)
        outputs = {alignment: s.module(*inputs) for alignment, s in aligned.items()}
        for alignment, output in outputs.items():
            outcome = compare(output, expected, W4A4)
            assert outcome.verdict == OK, (tokens, alignment, outcome)
            # Zeros are added: only the order of the sums differs, and few codes with it.
            outcome = compare(output, outputs[128], SAME_KERNEL)
            assert outcome.verdict == OK, (tokens, alignment, outcome)


# The tuner's largest bucket in the reports above.
@blackwell
@pytest.mark.parametrize("model", LAYERS)
def test_16384_tokens(model):
    layer = subject(model, 16384)
    for check in (numbers, finite_and_not_zero):
        outcome = check(layer, 16384)
        assert outcome.verdict == OK, outcome


# vLLM issue 37605: wrong where all logits of a token are negative, which every second token's are.
@blackwell
@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("tokens", [1, 7, 300, 5000])
def test_fused_routing_of_many_seeds(model, tokens):
    layer = subject(model, tokens, hidden_size=512, intermediate_size=256)
    for seed in range(25):
        outcome = fused_routing(layer, METHODS[model], seed)
        assert outcome.verdict == OK, (seed, outcome)


@blackwell
@pytest.mark.parametrize("model", LAYERS)
def test_autotune_changes_no_numbers(model, tmp_path):
    sizes = (1, 7, 128, 1000)
    layer = subject(model, *sizes, num_experts=16)
    untuned = {tokens: layer.module(*layer.inputs(tokens)) for tokens in sizes}
    cache = tmp_path / "tuned.json"
    assert autotune(layer.module, max_tokens=1024, cache=cache) == 1
    assert cache.is_file()
    for tokens in sizes:
        tuned = layer.module(*layer.inputs(tokens))
        outcome = compare(tuned, untuned[tokens], SAME_KERNEL)
        assert outcome.verdict == OK, (tokens, outcome)
        outcome = numbers(layer, tokens)
        assert outcome.verdict == OK, (tokens, outcome)


@blackwell
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("routing", ["given", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_replaced_compiled_and_generating(name, routing):
    model = enlarge_experts(MODELS[name]()).to(DEVICE)
    # The same experts twice: by the kernel, and by its definition.
    wanted = replace_moe(copy.deepcopy(model), kernel="reference_w4a4", progress=False)
    fused = replace_moe(model, kernel=KERNEL, progress=False, routing=routing)
    prompt = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def logits(module, ids):
        with torch.no_grad():
            return module(ids, use_cache=False).logits

    expected = logits(wanted, prompt)
    assert typical_error(logits(fused, prompt), expected) < 2**0.5 * W4A4
    compiled = torch.compile(fused, fullgraph=True)
    assert typical_error(logits(compiled, prompt), logits(fused, prompt)) < 2**0.5 * W4A4

    out = generate(fused, prompt)
    assert out.shape == (2, 46)
    # Every greedy choice is the best of one full pass, or nearly so.
    scores = logits(fused, out)[:, 39:-1].float()
    chosen = scores.gather(2, out[:, 40:, None]).squeeze(2)
    assert bool((scores.amax(2) - chosen <= W4A4 * 4 * scores.std(2)).all())


def typical_error(actual, expected):
    """The median token's relative error, for two layers: a changed choice of experts moves few."""
    difference = (actual.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1)).median())


def test_the_models_of_this_file_show_a_wrong_layer():
    # Without such a difference the comparison of logits above would say nothing.
    for build in MODELS.values():
        model = replace_moe(enlarge_experts(build()), kernel="reference", progress=False)
        prompt = torch.arange(1, 41).repeat(2, 1)
        with torch.no_grad():
            before = model(prompt, use_cache=False).logits
            for module in model.modules():
                if hasattr(module, "down_packed"):
                    module.prepared_down_packed.copy_(module.prepared_down_packed.roll(1, 0))
            after = model(prompt, use_cache=False).logits
        assert typical_error(after, before) > 2 * 2**0.5 * W4A4


def test_subjects_differ_in_their_alignment_only():
    small = {"hidden_size": 80, "intermediate_size": 48, "num_experts": 3, "top_k": 2}
    sizes = {**LAYERS["Nemotron-3-Nano-30B"], **small}
    options = {"device": torch.device("cpu"), "tokens": (3,)}
    first = make_subject("reference", sizes, hidden_alignment=128, **options)
    second = make_subject("reference", sizes, hidden_alignment=512, **options)
    for name, tensor in first.weights.operands().items():
        assert torch.equal(tensor, second.weights.operands()[name])
    assert dataclasses.replace(first, hidden_alignment=512).inputs(3)[1].equal(second.inputs(3)[1])
