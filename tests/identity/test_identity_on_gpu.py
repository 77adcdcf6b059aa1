"""Whose weights a graph computes with on a GPU, where CUDA graphs go on with what they recorded."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from adapters import lora
from identity_models import build, layers, ways
from tiny_models import Block, experts_class, routed
from torch import nn

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.identity.fingerprint import sampled_hashes
from fp4moe.identity.table import Mark
from fp4moe.identity.value_watch import ValueWatch
from fp4moe.testing import relative_error

# The same operator on hidden states that differ by 1e-6: one in 500 is rounded to another bfloat16,
# 2^-8 off, 2e-4 in RMS; five-fold. Another model's weights would be 1.
SAME = 1e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    # Of Inductor, on the softmax of attention over few keys.
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),
]
CUDA_GRAPHS = {"triton.cudagraphs": True}


def on_gpu(name, seed=0):
    return build(name, seed).cuda()


def run(model, length=5):
    ids = torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(length))
    # For layers that are compiled apart, whose outputs are one another's inputs.
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        # A copy: the next replay of a CUDA graph writes over its output.
        return model(ids.cuda(), use_cache=False).logits.clone()


def expected(model):
    return run(fp4moe.replace_moe(copy.deepcopy(model), progress=False))


def with_cuda_graphs(way, **options):
    """The arguments of torch.compile, with Inductor's CUDA graphs."""
    if way == "pass":
        return {"options": {**fp4moe.inductor_options(on_no_match="ignore"), **CUDA_GRAPHS}}
    settings = {"inner_options": CUDA_GRAPHS, "on_no_match": "ignore", **options}
    return {"backend": fp4moe.backend, "options": settings}


RELEASING = [("backend", {}), ("backend", {"release_weights": True}), ("pass", {})]


@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
@pytest.mark.parametrize("way, options", RELEASING)
def test_layers_compiled_one_by_one(way, options, name):
    model = on_gpu(name)
    wanted = expected(model)
    for layer in layers(model):
        layer.compile(**with_cuda_graphs(way, **options))
    for _ in range(4):
        assert relative_error(run(model), wanted) < SAME


@pytest.mark.parametrize("way, options", RELEASING)
def test_two_models_by_turns_and_one_after_the_other(way, options):
    models = [on_gpu("qwen3_moe", seed) for seed in range(2)]
    wanted = [expected(model) for model in models]
    compiled = [torch.compile(model, **with_cuda_graphs(way, **options)) for model in models]
    for number in (0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1):
        assert relative_error(run(compiled[number]), wanted[number]) < SAME
    # Another model may get the very addresses of one that is gone.
    for seed in range(2, 5):
        models.clear()
        compiled.clear()
        gc.collect()
        models.append(on_gpu("qwen3_moe", seed))
        compiled.append(torch.compile(models[0], **with_cuda_graphs(way, **options)))
        wanted = expected(on_gpu("qwen3_moe", seed))
        for _ in range(4):
            assert relative_error(run(compiled[0]), wanted) < SAME


@pytest.mark.parametrize("way", ["backend", "pass"])
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_merge_and_unmerge_under_cuda_graphs(way, name):
    model = on_gpu(name)
    compiled = torch.compile(model, **with_cuda_graphs(way))
    wanted = expected(model)
    for _ in range(4):
        assert relative_error(run(compiled), wanted) < SAME
    weights = [p for p in model.parameters() if p.ndim == 3]
    deltas = [torch.randn_like(weight) / 16 for weight in weights]
    for sign in (1, -1):
        # As adapters do; neither version nor address tells of it.
        for weight, delta in zip(weights, deltas, strict=True):
            weight.data += sign * delta
        wanted = expected(model)
        # Only a look at the values can tell: the second call at the latest.
        run(compiled)
        for _ in range(3):
            assert relative_error(run(compiled), wanted) < SAME
    for weight in weights:
        weight.mul_(-1)
    # The version tells: the next call.
    assert relative_error(run(compiled), expected(model)) < SAME


def test_peft_under_cuda_graphs():
    model = on_gpu("qwen3_moe")
    compiled = torch.compile(model, **with_cuda_graphs("backend"))
    for _ in range(4):
        run(compiled)
    lora(model, lora_alpha=64).merge_and_unload()
    run(compiled)
    assert relative_error(run(compiled), expected(model)) < SAME


def test_nothing_new_is_packed_inside_a_capture():
    model = on_gpu("qwen3_moe")
    compiled = torch.compile(model, **ways("eager"))
    ids = torch.ones(2, 4, dtype=torch.long, device="cuda")
    with torch.no_grad():
        wanted = compiled(ids, use_cache=False).logits
        torch.compiler.reset()
        other = on_gpu("qwen3_moe", 1)
        compiled = torch.compile(other, **ways("eager"))
        compiled(ids, use_cache=False)
        for weight in (p for p in other.parameters() if p.ndim == 3):
            weight.mul_(2)
        with pytest.raises(UnsupportedError, match="because a CUDA graph is being captured"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                compiled(ids, use_cache=False)
        torch.cuda.synchronize()
        wanted = compiled(ids, use_cache=False).logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = compiled(ids, use_cache=False).logits
        graph.replay()
    assert relative_error(actual, wanted) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 96, 64), (128, 70, 33), (48, 7), (3,), (1, 1)])
def test_a_look_agrees_with_the_definition(shape, dtype):
    tensor = torch.randn(shape, device="cuda").to(dtype)
    mark, watch = Mark(tensor), ValueWatch()
    watch.look([(tensor, mark)])
    assert not watch.read(())
    tensor.data.add_(1)
    changed = not torch.equal(mark.hashes, sampled_hashes(tensor))
    watch.look_again()
    assert watch.read(()) == changed == mark.stale


def test_a_look_waits_for_nothing():
    tensor = torch.randn(64, 96, 64, device="cuda", dtype=torch.bfloat16)
    mark, watch = Mark(tensor), ValueWatch()
    watch.look([(tensor, mark)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.read(())
        watch.look_again()
        watch.begin()
        watch.look_beside()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_look_beside_a_call_sees_what_stood_before_it_and_no_later_write():
    tensor = torch.randn(64, 96, 64, device="cuda", dtype=torch.bfloat16)
    mark, watch = Mark(tensor), ValueWatch()
    watch.note([(tensor, mark)])
    # About 0.1 s of work, beside which the look runs.
    for _ in range(3):
        watch.begin()
        torch.cuda._sleep(100_000_000)
        watch.look_beside()
        assert not watch.read(())
    watch.begin()
    watch.look_beside()
    # Behind the look, though the host does not wait for it.
    tensor.data.add_(1)
    assert not watch.read(())
    watch.begin()
    watch.look_beside()
    assert watch.read(()) and mark.stale


def test_released_memory_is_free():
    block = Block(experts_class()).cuda()
    size = 1024
    for name, rows in (("gate_up_proj", 2 * size), ("down_proj", size)):
        weight = torch.randn(8, rows, size, device="cuda") / 32
        setattr(block.experts, name, nn.Parameter(weight, requires_grad=False))
    del weight
    inputs = [torch.randn(5, size, device="cuda"), *(x.cuda() for x in routed(5)[1:])]
    compiled = torch.compile(block, **ways("eager", release_weights=True))
    floats = sum(p.nbytes for p in block.parameters())
    with torch.no_grad():
        # The first products allocate cuBLAS's workspace, which stays.
        block(*inputs)
        before = torch.cuda.memory_allocated()
        compiled(*inputs)
    gc.collect()
    assert not any(p.untyped_storage().nbytes() for p in block.parameters())
    # Packed weights have 4.5 of 32 bits; what else is kept is smaller than a hundredth.
    assert torch.cuda.memory_allocated() < before - floats + 0.15 * floats
