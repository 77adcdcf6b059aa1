"""Work that is done once: choosing a kernel, laying weights out, undoing that. It is counted."""

from __future__ import annotations

import collections
import contextlib
import sys
import weakref
from pathlib import Path

import pytest
import torch
from flipped_kernel import flipped  # noqa: F401
from fused_layers import layer, tokens
from tiny_models import gemma4, qwen3_moe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fp4moe
from fp4moe import FusedExperts, fused_moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.identity.value_watch import ValueWatch
from fp4moe.kernels import KERNELS, base, measured
from fp4moe.kernels.operands import Operands
from fp4moe.kernels.reference import REFERENCE
from fp4moe.models.routers import FusedRouter


def renormalised_qwen3_moe():
    """Its router renormalises, as kernels do."""
    model = qwen3_moe()
    model.config.norm_topk_prob = True
    for block in model.model.layers:
        block.mlp.gate.norm_topk_prob = True
    return model


MODELS = {"gemma4": gemma4, "qwen3_moe": renormalised_qwen3_moe}
IDS = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture
def asked(monkeypatch):
    """How often each kernel was asked whether it can run a layer."""
    counts: collections.Counter = collections.Counter()

    def counting(name, ask):
        def reasons_not_to_run(layer, capability):
            counts[name] += 1
            return ask(layer, capability)

        return reasons_not_to_run

    for name, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, "reasons_not_to_run", counting(name, kernel.reasons_not_to_run))
    return counts


AUTOMATIC = {name: 1 for name, kernel in KERNELS.items() if kernel.automatic}


def test_auto_asks_each_kernel_once(asked):
    weights = layer()
    x, ids, routing = tokens(5, weights)
    results = [fused_moe(x[:t], weights, ids[:t], routing[:t]) for t in (5, 5, 1, 0)]
    assert asked == AUTOMATIC
    assert torch.equal(results[0], results[1]) and torch.equal(results[0][:1], results[2])
    for dtype in (torch.float16, torch.float32):
        fused_moe(x.to(dtype), weights, ids.int(), routing.to(dtype))
    with torch.inference_mode():
        fused_moe(x, weights, ids, routing)
    assert asked == AUTOMATIC


def test_it_asks_again_where_the_answer_may_be_another(asked, monkeypatch):
    weights = layer()
    x, ids, routing = tokens(5, weights)

    def again(**options):
        asked.clear()
        fused_moe(x, options.pop("weights", weights), ids, routing, **options)
        return dict(asked)

    assert again() == AUTOMATIC and again() == {}
    assert again(kernel="reference") == {"reference": 1} and again(kernel="reference") == {}
    assert again(weights=layer()) == AUTOMATIC and again() == {}
    ids, routing = ids[:, :1], routing[:, :1]
    assert again() == AUTOMATIC and again() == {}
    measured.forget()
    assert again() == AUTOMATIC and again() == {}
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, "/nowhere")
        assert again() == AUTOMATIC and again() == {}
    monkeypatch.setattr(base, "query_capability", lambda device: (6, 1))
    assert again() == AUTOMATIC and again() == {}
    # The new answer counts, a refusal too.
    monkeypatch.setattr(REFERENCE, "reasons_not_to_run", lambda *args: ["is tired"])
    assert again() == {}
    measured.forget()
    with pytest.raises(UnsupportedError, match="reference: is tired"):
        again()


def test_a_refusal_is_not_remembered(asked):
    weights = layer()
    x, ids, routing = tokens(5, weights)
    for count in (1, 2):
        with pytest.raises(UnsupportedError, match="needs compute capability"):
            fused_moe(x, weights, ids, routing, kernel="humming")
        assert asked == {"humming": count}
    for wrong in ("none", ["reference"]):
        with pytest.raises(UnsupportedError, match=r"^fused_moe: kernel must be auto"):
            fused_moe(x, weights, ids, routing, kernel=wrong)


def test_weights_are_laid_out_once_and_again_when_they_change(asked, flipped):  # noqa: F811
    weights = layer()
    args = tokens(5, weights)

    def check(prepared):
        """The kernel's result is the reference's, after this many layouts."""
        got = fused_moe(args[0], weights, *args[1:], kernel="flipped")
        want = fused_moe(args[0], weights, *args[1:], kernel="reference")
        again = fp4moe.reference.reference(args[0], weights, *args[1:])
        assert torch.equal(got, want) and torch.equal(got, again)
        assert flipped.calls["prepare"] == prepared
        return got

    results = [check(1), check(1)]
    changes = (
        lambda: weights.down.global_scale.mul_(2),
        lambda: weights.gate_up.packed.copy_(weights.gate_up.packed.flip(0)),
        lambda: weights.intermediate_scale.fill_(3),
    )
    for count, change in enumerate(changes, 2):
        change()
        results.append(check(count))
    # What autograd does not count: other values behind the same tensor.
    weights.down.block_scale.data = weights.down.block_scale.flip(0)
    results.append(check(5))
    check(5)
    # Nor this, which only the values tell.
    weights.gate_up.packed.data[2] ^= 3
    assert not torch.equal(check(6), results[5])
    weights.down.packed.numpy()[...] ^= 1
    check(7)
    assert torch.equal(results[0], results[1]) and torch.equal(results[3], results[4])
    for one, other in ((1, 2), (2, 3), (4, 5)):
        assert not torch.equal(results[one], results[other])
    assert asked["reference"] == flipped.calls["reasons_not_to_run"] == 1


@pytest.mark.parametrize("kernel", ["reference", "flipped"])
def test_what_is_kept_dies_with_the_weights(kernel, flipped):  # noqa: F811
    weights = layer()
    x, ids, routing = tokens(5, weights)
    fused_moe(x, weights, ids, routing, kernel=kernel)
    kept = [weakref.ref(weights), weakref.ref(weights.gate_up.packed), *flipped.made]
    assert all(reference() is not None for reference in kept)
    del weights
    assert all(reference() is None for reference in kept)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["reference", "flipped"])
def test_modes_leave_nothing_behind(kernel, flipped):  # noqa: F811
    weights = layer()
    x, ids, routing = tokens(5, weights)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        placed = [fake.from_tensor(t) for t in (x, ids, routing)]
        assert fused_moe(placed[0], weights, *placed[1:], kernel=kernel).shape == x.shape
    want = fp4moe.reference.reference(x, weights, ids, routing)
    for mode in (contextlib.nullcontext(), Passing(), torch.inference_mode()):
        with mode:
            got = fused_moe(x, weights, ids, routing, kernel=kernel)
        assert type(got) is torch.Tensor and torch.equal(got, want)
    prepared = flipped.calls["prepare"]
    fused_moe(x, weights, ids, routing, kernel=kernel)
    assert flipped.calls["prepare"] == prepared


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["given", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_calibration_undoes_a_layout_once(name, routing, flipped):  # noqa: F811
    reports = []
    for kernel in ("flipped", "reference"):
        model = fp4moe.replace_moe(MODELS[name](), kernel=kernel, routing=routing, progress=False)
        blocks = [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
        assert sum(isinstance(m, FusedRouter) for m in model.modules()) == 2 * (routing == "fused")
        flipped.calls.clear()
        with fp4moe.calibrate(model) as report, torch.no_grad():
            for batch in (IDS, IDS + 40, IDS + 80):
                model(batch)
            if kernel == "flipped":
                assert flipped.calls == {"run": 6, "restore": 2}
            # New weights are seen: the layout is undone for the one that has them.
            blocks[0].set_activation_scales(2.0, 3.0)
            state = blocks[0].state_dict()
            blocks[0].load_state_dict({**state, "gate_up_packed": state["gate_up_packed"].flip(0)})
            flipped.calls.clear()
            model(IDS)
            model(IDS)
            if kernel == "flipped":
                assert flipped.calls == {"run": 4, "restore": 1}
        reports.append(report.blocks)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("routing", ["given", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_lays_weights_out_once(name, routing, flipped, tmp_path):  # noqa: F811
    MODELS[name]().save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "routing": routing, "progress": False}
    model = fp4moe.from_pretrained(tmp_path, kernel="flipped", **options)
    assert flipped.calls["prepare"] == 2 and flipped.calls["restore"] == 0
    experts = [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert [m.kernel for m in experts] == ["flipped"] * 2
    assert sum(isinstance(m, FusedRouter) for m in model.modules()) == 2 * (routing == "fused")
    plain = fp4moe.from_pretrained(tmp_path, kernel="reference", **options)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert flipped.calls["run"] == 2


def test_no_values_are_looked_at_where_the_kernel_reads_the_weights_themselves(monkeypatch):
    weights = layer()
    x, ids, routing = tokens(5, weights)
    own = weights.tensors()
    assert weights.operands()["gate_up_packed"] is own["gate_up.packed"]
    looks = []
    monkeypatch.setattr(ValueWatch, "read", lambda self, pairs: looks.append(pairs))
    for _ in range(2):
        fused_moe(x, weights, ids, routing, kernel="reference")
    assert not looks


def functions_before_the_kernel(call):
    """The package's functions that a call runs through up to the kernel's run, with their files."""
    folder, found = str(Path(fp4moe.__file__).parent), []

    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            found.append((code.co_filename, code.co_name))
            if code.co_name == "run":
                sys.setprofile(None)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    assert found[-1][1] == "run"
    return found


def test_the_walk_from_the_module_to_the_kernel_is_short():
    weights = layer()
    args = tokens(5, weights)
    module = FusedExperts(weights, "reference")
    for call, functions, files in (
        (lambda: module(*args), 7, 4),
        (lambda: fused_moe(args[0], weights, *args[1:], kernel="reference"), 18, 8),
    ):
        call()
        found = functions_before_the_kernel(call)
        assert len(found) <= functions, found
        assert len({file for file, _ in found}) <= files, found


@pytest.mark.parametrize("name", ["hidden", "expert_ids", "routing_weights", *Operands._fields[:8]])
def test_a_call_that_has_passed_lets_no_other_through(name, monkeypatch):
    """After a good call, one whose only tensor that differs is wrong in dtype, shape or device."""
    checked = []
    check = REFERENCE.check
    monkeypatch.setattr(REFERENCE, "check", lambda call: checked.append(call) or check(call))
    weights = layer()
    module = FusedExperts(weights, "reference")
    operands = [getattr(module, f"prepared_{field}") for field in Operands._fields[:8]]
    args = [*tokens(5, weights), *operands, *module._arguments]
    operator = torch.ops.fp4moe.nvfp4_moe.default
    want = operator(*args)
    place = ("hidden", "expert_ids", "routing_weights", *Operands._fields).index(name)
    tensor = args[place]
    for wrong in (tensor.to(torch.int16), tensor[..., :0], tensor[:1, None], tensor.to("meta")):
        with pytest.raises((ShapeError, NotImplementedError)):
            operator(*args[:place], wrong, *args[place + 1 :])
        assert torch.equal(operator(*args), want)
    assert len(checked) == 1
    # The same memory with other strides is told apart, since some kernels ask for it.
    other = tensor.expand(2, *tensor.shape)[0] if tensor.ndim == 1 else tensor.mT.contiguous().mT
    assert torch.equal(operator(*args[:place], other, *args[place + 1 :]), want)
    strided = tensor.ndim > 1 and not other.is_contiguous() and place > 2
    assert len(checked) == 1 + strided
