"""Several threads at once: right numbers, and what belongs to the process is as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading

import pytest
import torch
from checkpoint_makers import load_tensors, save_float
from loop_models import H, OlmoeOld, make_model
from tiny_models import enlarge_experts, gemma4, nemotron_h, qwen3_moe

import fp4moe
from fp4moe.borrowed import random_state_kept
from fp4moe.experts import ExpertWeights
from fp4moe.kernels.flashinfer import library as flashinfer_library
from fp4moe.passes.graph.execute import undisturbed
from fp4moe.precision import float32_as_written
from fp4moe.testing import float_weights

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def together(*functions):
    """Run each in a thread of its own, from one moment on; returns what they return."""
    results, start = [None] * len(functions), threading.Barrier(len(functions))

    def run(place):
        start.wait()
        try:
            results[place] = functions[place]()
        except Exception as error:  # raised again below
            results[place] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def overlap(first, second, look):
    """Enter first, enter second, leave first, look, leave second, in a thread each."""
    inside, left = threading.Event(), threading.Event()

    def outer():
        with first:
            inside.set()
            assert both.wait(60)
        left.set()

    def inner():
        assert inside.wait(60)
        with second:
            both.set()
            assert left.wait(60)
            return look()

    both = threading.Event()
    return together(outer, inner)[1]


def precision():
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


def test_the_last_thread_puts_float32_products_back(float32_products):
    before = precision()
    during = overlap(float32_as_written(CPU), float32_as_written(CPU), precision)
    assert during == ("ieee", "ieee")
    assert precision() == before


@pytest.mark.parametrize("context", [random_state_kept, lambda: undisturbed(CPU)])
def test_the_last_thread_puts_the_random_state_back(context):
    before = torch.get_rng_state()
    overlap(context(), context(), lambda: torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with contextlib.suppress(KeyError), random_state_kept():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_tuning_ends_with_the_last_thread():
    assert not flashinfer_library.is_tuning()
    tuning = flashinfer_library._tuning
    assert overlap(tuning.borrow(), tuning.borrow(), flashinfer_library.is_tuning)
    assert not flashinfer_library.is_tuning()


def stacked(build):
    return lambda: enlarge_experts(build()).requires_grad_(False)


MODELS = {
    "qwen3_moe": (stacked(qwen3_moe), IDS),
    "nemotron_h": (stacked(nemotron_h), IDS),
    "loop": (lambda: make_model(OlmoeOld), torch.linspace(-1, 1, 5 * H).reshape(1, 5, H)),
}


def run(model, given):
    with torch.no_grad():
        out = model(given)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_four_threads_replace_four_models(name, hasty, float32_settings):
    build, given = MODELS[name]
    model = build()
    expected = run(fp4moe.replace_moe(copy.deepcopy(model), progress=False), given)
    before, random = precision(), torch.get_rng_state()
    for _ in range(2):
        models = [copy.deepcopy(model) for _ in range(4)]
        together(*(lambda m=m: fp4moe.replace_moe(m, progress=False) for m in models))
        assert all(torch.equal(run(m, given), expected) for m in models)
        assert precision() == before
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
@pytest.mark.parametrize("build, routing", [(qwen3_moe, "given"), (gemma4, "fused")])
def test_four_threads_at_the_first_call_of_a_compiled_model(
    build, routing, hasty, float32_settings, fresh_dynamo
):
    model = stacked(build)()
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True
    options = {"inner_backend": "eager", "on_no_match": "error", "routing": routing}
    expected = run(fp4moe.replace_moe(copy.deepcopy(model), progress=False, routing=routing), IDS)
    before, random = precision(), torch.get_rng_state()
    compiled = torch.compile(model, backend=fp4moe.backend, options=options)
    results = together(*[lambda: run(compiled, IDS)] * 4)
    assert all(torch.equal(result, results[0]) for result in results)
    # The block before and after it are the same operations.
    torch.testing.assert_close(results[0], expected)
    assert precision() == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("gated", [True, False])
def test_four_threads_at_the_first_fused_moe(gated, kernel, hasty):
    named, activation = float_weights(8, 64, 48, gated), "silu" if gated else "relu2"
    hidden, ids = torch.randn(5, 64), torch.rand(5, 8).argsort(1)[:, :2].contiguous()
    routing = torch.rand(5, 2)

    def make():
        return ExpertWeights.quantize(**named, activation=activation)

    expected = fp4moe.fused_moe(hidden, make(), ids, routing, kernel=kernel)
    weights = make()
    call = functools.partial(fp4moe.fused_moe, hidden, weights, ids, routing, kernel=kernel)
    assert all(torch.equal(result, expected) for result in together(*[call] * 4))


def test_two_threads_write_and_leave_the_number_of_threads(tmp_path, hasty):
    before = torch.get_num_threads()
    for build in ("qwen3_moe", "nemotron_h"):
        save_float(build, tmp_path / build)
    torch.set_num_threads(3)
    try:
        together(
            *(
                lambda name=name, n=n: fp4moe.quantize_checkpoint(
                    tmp_path / name, tmp_path / f"{name}{n}", progress=False
                )
                for name in ("qwen3_moe", "nemotron_h")
                for n in range(2)
            )
        )
        assert together(torch.get_num_threads) == [3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for name in ("qwen3_moe", "nemotron_h"):
        tensors = [load_tensors(tmp_path / f"{name}{n}") for n in range(2)]
        assert tensors[0].keys() == tensors[1].keys()
        for key in tensors[0]:
            assert torch.equal(*(t[key].reshape(-1).view(torch.uint8) for t in tensors)), key


def test_overlapping_calibrations_leave_compiling_on():
    models = [qwen3_moe(), qwen3_moe()]
    contexts = [fp4moe.calibrate(fp4moe.replace_moe(m, progress=False)) for m in models]
    ids = torch.arange(8)[None]
    for context, model in zip(contexts, models, strict=True):
        context.__enter__()
        model(ids)
    for context in contexts:
        context.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "default"
