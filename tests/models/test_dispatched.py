"""Packed experts whose buffers accelerate has moved one by one: the kernel of where they are now.

`Module.to` prepares again by itself; accelerate sets buffer after buffer.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from saved_files import logits
from tiny_models import enlarge_experts, gemma4, nemotron_h, qwen3_moe
from turned_kernel import KERNELS, TurnedKernel

import fp4moe
from fp4moe import module as module_file
from fp4moe.testing import relative_error

accelerate = pytest.importorskip("accelerate", reason="optional package")
BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}


def experts(model):
    return [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


def packed_elsewhere(name, monkeypatch):
    """A model packed for a device that is not here, by a kernel with a layout of its own."""
    kernel = TurnedKernel()
    kernel.name = "turned"
    monkeypatch.setitem(KERNELS, "turned", kernel)
    with monkeypatch.context() as there:
        there.setattr(module_file, "select_kernel", lambda *args, **options: "turned")
        model = fp4moe.replace_moe(enlarge_experts(BUILDS[name]()), progress=False)
    for module in experts(model):
        assert module.kernel == "turned"
        # As if the buffers had been moved since.
        module._place = torch.device("cuda", 0)
    return model


@pytest.mark.parametrize("name", BUILDS)
def test_the_first_call_prepares_for_where_the_buffers_are(name, monkeypatch):
    model = packed_elsewhere(name, monkeypatch)
    expected = logits(fp4moe.replace_moe(enlarge_experts(BUILDS[name]()), progress=False))
    assert torch.equal(logits(model), expected)
    assert {m.kernel for m in experts(model)} == {"reference"}
    buffers = [b for m in experts(model) for b in m.buffers()]
    assert torch.equal(logits(model), expected)
    assert all(
        a is b
        for a, b in zip(buffers, (b for m in experts(model) for b in m.buffers()), strict=True)
    )


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_threads_wait_for_the_one_that_prepares(name, monkeypatch, hasty):
    model = packed_elsewhere(name, monkeypatch)
    expected = logits(fp4moe.replace_moe(enlarge_experts(BUILDS[name]()), progress=False))
    found = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("how", ["dispatch_model", "cpu_offload"])
def test_no_kernel_of_the_cpu_stays_on_a_gpu(name, how):
    model = fp4moe.replace_moe(enlarge_experts(BUILDS[name]()), progress=False)
    assert {m.kernel for m in experts(model)} == {"reference"}
    ids = torch.arange(1, 25).reshape(2, 12).cuda()
    with torch.no_grad():
        expected = copy.deepcopy(model).cuda()(ids, use_cache=False).logits
        if how == "dispatch_model":
            accelerate.dispatch_model(model, {"": 0}, force_hooks=True)
        else:
            accelerate.cpu_offload(model, torch.device("cuda", 0), offload_buffers=True)
        actual = model(ids, use_cache=False).logits
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert {m.kernel for m in experts(model)} == {"hopper" if hopper else "triton"}
    assert all(b.is_cuda for m in experts(model) for b in m.buffers())
    assert relative_error(actual, expected) < 1e-6
