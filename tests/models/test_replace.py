"""replace_moe: what it refuses and leaves alone, the memory it takes, and the model it returns."""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from tiny_models import (
    MODELS,
    enlarge_experts,
    fingerprint,
    gemma4,
    mixed_gates,
    nemotron_h,
    qwen3_moe,
)
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain, replace_moe
from fp4moe.module import FusedExperts
from fp4moe.reference import reference_w4a4
from fp4moe.testing import relative_error

IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71]])
FIRST, LAST = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def replaced(build=qwen3_moe, **options):
    return replace_moe(enlarge_experts(build()), progress=False, **options)


def fused_parts(model):
    return [m for m in model.modules() if isinstance(m, FusedExperts)]


# What makes the last layer (or all) impossible, and the reason that is given for it.


def nan_in_the_last_expert(model, experts):
    experts.down_proj.data[-1, -1, -1] = float("nan")


def infinity(model, experts):
    experts.gate_up_proj.data[2, 3, 4] = float("-inf")


def meta(model, experts):
    experts.to("meta")


def uninitialised(model, experts):
    experts._parameters["down_proj"] = nn.UninitializedParameter()


def float8(model, experts):
    weight = experts.down_proj.detach().to(torch.float8_e4m3fn)
    experts.down_proj = nn.Parameter(weight, requires_grad=False)


def int8(model, experts):
    weight = torch.zeros(experts.gate_up_proj.shape, dtype=torch.int8)
    experts.gate_up_proj = nn.Parameter(weight, requires_grad=False)


class Wrapped(torch.Tensor):
    """A tensor subclass, as quantisers and sharding bring them."""


def tensor_subclass(model, experts):
    experts.down_proj = nn.Parameter(experts.down_proj.detach().as_subclass(Wrapped))


def forward_hook(model, experts):
    experts.register_forward_hook(lambda *args: None)


def forward_pre_hook(model, experts):
    experts.act_fn.register_forward_pre_hook(lambda *args: None)


def forward_on_the_instance(model, experts):
    original = experts.forward
    experts.forward = lambda *args: 2 * original(*args)


def released_storage(model, experts):
    experts.down_proj.untyped_storage().resize_(0)


def expert_parallel(model, experts):
    experts._is_expert_parallel = True


def flat_weight(model, experts):
    experts.down_proj = nn.Parameter(experts.down_proj.detach().flatten(1))


def several_devices(model, experts):
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to("meta"))


def other_activation(model, experts):
    experts.act_fn = nn.Mish()


LAST_ONLY = {
    nan_in_the_last_expert: "down_proj, expert 7, holds inf or NaN; load a sound checkpoint",
    infinity: "gate_up_proj, expert 2, holds inf or NaN; load a sound checkpoint",
    meta: "gate_up_proj is on the meta device (not loaded, or offloaded); load it onto a real",
    uninitialised: "down_proj is uninitialised; run the model once or load its weights",
    float8: "down_proj is torch.float8_e4m3fn, not bfloat16, float16 or float32; dequantise it",
    int8: "gate_up_proj is torch.int8, not bfloat16, float16 or float32; dequantise it first",
    tensor_subclass: "down_proj is a Wrapped, not a plain tensor; gather or dequantise it first",
    forward_hook: "it has forward hooks, which would be lost; remove them and register them again",
    forward_pre_hook: "it has forward hooks, which would be lost; remove them and register them",
    forward_on_the_instance: "its forward was replaced on the instance; undo that first",
    released_storage: "down_proj has no storage (it was released); load the model again",
    expert_parallel: "it is split by expert parallelism; replace it before it is distributed",
    flat_weight: "it has no 3-D parameters gate_up_proj and down_proj",
    several_devices: "its weights are on several devices (cpu, meta); move them to one",
    other_activation: "its _apply_gate is not act(gate) * up with one of our activations; closest",
}


def tied(model):
    first, last = model.get_submodule(FIRST), model.get_submodule(LAST)
    last.down_proj = first.down_proj


def view_of_another(model):
    first, last = model.get_submodule(FIRST), model.get_submodule(LAST)
    both = torch.cat((first.down_proj.data, last.down_proj.data))
    first.down_proj.data, last.down_proj.data = both[:8], both[8:]


def modelopt_config(model):
    model.config.quantization_config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def cpu_offload(model):
    accelerate = pytest.importorskip("accelerate", reason="optional package")
    accelerate.cpu_offload(model, execution_device="cpu")


def hooks_of_accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks", reason="optional package")
    hooks.add_hook_to_module(model.get_submodule(FIRST), hooks.ModelHook())
    hooks.add_hook_to_module(model.get_submodule(LAST), hooks.ModelHook())


BOTH = {
    tied: f"down_proj shares its storage with {LAST}.down_proj; untie them first",
    view_of_another: f"down_proj shares its storage with {LAST}.down_proj; untie them first",
    modelopt_config: "the model says that it was loaded from a 'modelopt' checkpoint, which trans",
    cpu_offload: "its weights are offloaded by accelerate; load the model onto a device",
    hooks_of_accelerate: "it has forward hooks, which would be lost; remove them and register",
}


def check_refused(model, reason, count, **options):
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        replace_moe(model, progress=False, **options)
    text = str(raised.value)
    assert text.startswith(
        f"replace_moe: {count} of 2 blocks cannot be replaced, because "
        f"{LAST if count == 1 else FIRST}: "
    )
    assert reason in text
    assert text.endswith("Pass strict=False to leave these as they are.")
    assert fingerprint(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("spoil", LAST_ONLY, ids=lambda spoil: spoil.__name__)
def test_one_impossible_layer_leaves_the_whole_model_alone(spoil):
    model = qwen3_moe()
    spoil(model, model.get_submodule(LAST))
    check_refused(model, LAST_ONLY[spoil], 1)
    row = explain(model).blocks[1]
    # explain reads a few tokens' numbers, not every weight.
    if spoil not in (nan_in_the_last_expert, infinity):
        assert (row.path, row.status) == (LAST, "not replaceable")
        assert any(LAST_ONLY[spoil] in reason for reason in row.reasons)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", LAST_ONLY, ids=lambda spoil: spoil.__name__)
def test_strict_false_replaces_the_others_and_logs_why(spoil, caplog):
    model = qwen3_moe()
    last = model.get_submodule(LAST)
    spoil(model, last)
    before = fingerprint(last)
    with caplog.at_level(logging.WARNING, "fp4moe"):
        assert replace_moe(model, progress=False, strict=False) is model
    assert isinstance(model.get_submodule(FIRST), FusedExperts)
    assert model.get_submodule(LAST) is last
    assert fingerprint(last) == before
    (message,) = (r.getMessage() for r in caplog.records if r.name == "fp4moe")
    assert message.startswith(f"replace_moe: {LAST} is left as it is: ")
    assert LAST_ONLY[spoil] in message


@pytest.mark.parametrize("spoil", BOTH, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("strict", [True, False])
def test_what_concerns_every_layer_refuses_every_layer(spoil, strict, caplog):
    model = qwen3_moe()
    spoil(model)
    if strict:
        check_refused(model, BOTH[spoil], 2)
    else:
        before = fingerprint(model)
        assert replace_moe(model, progress=False, strict=False) is model
        assert BOTH[spoil] in caplog.text
        assert fingerprint(model) == before


def test_weights_offloaded_to_disk_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="optional package")
    model = qwen3_moe()
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    expected = logits(model)
    check_refused(model, "its weights are offloaded by accelerate; load the model onto a device", 2)
    assert torch.equal(logits(model), expected)


def test_one_module_in_two_places_is_refused():
    model = qwen3_moe()
    model.model.layers[1].mlp.experts = model.get_submodule(FIRST)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=rf"shares its storage with {LAST}\.down_proj; unti"):
        replace_moe(model, progress=False)
    assert fingerprint(model) == before


def test_lazy_parameters_elsewhere_do_not_matter():
    model = qwen3_moe()
    model.adapter = nn.LazyLinear(4)
    replace_moe(model, progress=False)
    assert len(fused_parts(model)) == 2


def test_an_experts_module_alone_has_no_parent_to_change():
    experts = qwen3_moe().get_submodule(FIRST)
    before = fingerprint(experts)
    text = "Qwen3MoeExperts: it is the model itself; wrap it in a module."
    with pytest.raises(UnsupportedError, match=text):
        replace_moe(experts, progress=False)
    assert fingerprint(experts) == before
    assert explain(experts).blocks[0].reasons == ("it is the model itself; wrap it in a module",)
    wrapped = nn.ModuleList([experts])
    assert isinstance(replace_moe(wrapped, progress=False)[0], FusedExperts)


def test_a_model_without_experts_is_an_error_in_either_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = fingerprint(model)
    for strict in (True, False):
        with pytest.raises(UnsupportedError) as raised:
            replace_moe(model, strict=strict)
        assert "replace_moe: Sequential cannot be changed, because none of its" in str(raised.value)
    assert fingerprint(model) == before


NAMES = {
    "kernel": ("fp8", "kernel must be auto or one of flashinfer_trtllm, flashinfer_cutlass, tri"),
    "method": ("amax", "method must be one of max, mse; got 'amax'. Pass one of these."),
    "hidden_alignment": (64, "hidden_alignment must be one of 128, 256, 512; got 64. Pass one of"),
    "routing": ("softmax", "routing must be one of given, fused; got 'softmax'. Pass one of"),
}


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize("strict", [True, False])
def test_unknown_names_are_errors_in_either_mode(option, strict):
    value, message = NAMES[option]
    model = qwen3_moe()
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        replace_moe(model, strict=strict, progress=False, **{option: value})
    assert str(raised.value).startswith(f"replace_moe: {message}")
    assert repr(value) in str(raised.value)
    assert fingerprint(model) == before


def test_a_kernel_that_a_cpu_lacks_is_refused_by_name():
    check_refused(qwen3_moe(), "flashinfer_trtllm", 2, kernel="flashinfer_trtllm")


# Subclasses that compute something else; each is of the right shape everywhere.


class Doubled(Qwen3MoeExperts):
    def forward(self, *args):
        return 2 * super().forward(*args)


class DoubledBehindWraps(Qwen3MoeExperts):
    @functools.wraps(Qwen3MoeExperts.forward)
    def forward(self, *args):
        return 2 * Qwen3MoeExperts.forward(self, *args)


class UnderNoGrad(Qwen3MoeExperts):
    @torch.no_grad()
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) + hidden_states


class WithoutRoutingWeights(Qwen3MoeExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, torch.ones_like(top_k_weights))


class WeightsBeforeTheExperts(Qwen3MoeExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        scaled = hidden_states * top_k_weights.sum(1, keepdim=True)
        return super().forward(scaled, top_k_index, torch.ones_like(top_k_weights))


class SlightlyOff(Qwen3MoeExperts):
    def forward(self, *args):
        return 1.001 * super().forward(*args)


class Exchanged(Qwen3MoeExperts):
    """up first, then gate."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for k in range(top_k_index.shape[1]):
            for token, expert in enumerate(top_k_index[:, k].tolist()):
                up, gate = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                y = self.down_proj[expert] @ (self.act_fn(gate) * up)
                out[token] += top_k_weights[token, k] * y
        return out


class Mean(Qwen3MoeExperts):
    def forward(self, *args):
        return super().forward(*args).mean(1)


class Pair(Qwen3MoeExperts):
    def forward(self, *args):
        return super().forward(*args), None


OFF = "it does not compute a gated silu mixture of experts: relative error "
WRONG = {
    Doubled: OFF + "1 on random tokens, limit 0.0001",
    DoubledBehindWraps: OFF + "1 on random tokens, limit 0.0001",
    UnderNoGrad: OFF,
    WithoutRoutingWeights: OFF,
    WeightsBeforeTheExperts: OFF,
    SlightlyOff: OFF + "0.001 on random tokens, limit 0.0001",
    Exchanged: OFF,
    Mean: "its forward returns [5] for [5, 64] tokens",
    Pair: "its forward refuses five random torch.float32 tokens: 'tuple' object",
}


@pytest.mark.slow
@pytest.mark.parametrize("subclass", WRONG, ids=lambda c: c.__name__)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_wrong_maths_is_refused_by_its_numbers(subclass, implementation):
    model = qwen3_moe(implementation)
    model.model.layers[1].mlp.experts = other = subclass(model.config)
    other.load_state_dict(model.get_submodule(FIRST).state_dict())
    check_refused(model, WRONG[subclass], 1)


class Verbose(Qwen3MoeExperts):
    """Another forward, the same numbers."""

    calls = 0

    def forward(self, *args):
        type(self).calls += 1
        return super().forward(*args)


def test_a_subclass_of_the_same_numbers_is_replaced():
    model = qwen3_moe()
    model.model.layers[1].mlp.experts = other = Verbose(model.config)
    other.load_state_dict(model.get_submodule(FIRST).state_dict())
    replace_moe(model, progress=False)
    assert len(fused_parts(model)) == 2
    # It was asked for its numbers once, and its configuration is what it was.
    assert Verbose.calls == 1
    assert model.config._experts_implementation == "grouped_mm"


def test_checking_changes_nothing_on_the_way():
    """Every check that replace_moe makes before the first change, on models that pass it."""
    for build in MODELS.values():
        model = build()
        before, state = fingerprint(model), torch.random.get_rng_state()
        report = explain(model)
        assert report.count("replaceable") == len(report.blocks) == 2
        assert fingerprint(model) == before
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "build, routing", [(gemma4, "fused"), (nemotron_h, "fused"), (qwen3_moe, "given")]
)
def test_autocast_around_it_changes_nothing(build, routing):
    expected = replaced(build, routing=routing)
    with torch.autocast("cpu", torch.bfloat16):
        actual = replaced(build, routing=routing)
    assert torch.equal(logits(actual), logits(expected))


# Memory.


def test_the_float_weights_are_freed_without_a_garbage_collection():
    model = nemotron_h()
    experts = [m for m in model.modules() if hasattr(m, "is_transposed")]
    tensors = [weakref.ref(p) for m in experts for p in m.parameters()]
    modules = [weakref.ref(m) for m in experts]
    assert len(tensors) == 4
    del experts
    gc.collect()
    gc.disable()
    try:
        replace_moe(model, progress=False)
        assert [t() for t in tensors] == [None] * 4
        assert [m() for m in modules] == [None] * 2
    finally:
        gc.enable()


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_bytes_shrink_to_nine_bits_per_two_values(dtype, size):
    model = qwen3_moe(dtype=getattr(torch, dtype))
    before = explain(model)
    values = 8 * (96 * 64 + 64 * 48)
    assert [b.nbytes for b in before.blocks] == [size * values] * 2
    replace_moe(model, progress=False)
    after = explain(model)
    # Codes, block scales, two global scales and one activation scale an expert, one for the input.
    packed = values // 2 + values // 16 + 8 * 3 * 4 + 4
    assert [b.nbytes for b in after.blocks] == [packed] * 2
    assert before.nbytes / after.nbytes == pytest.approx(size * 16 / 9, rel=0.005)
    for part in fused_parts(model):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in part.buffers()}
        assert sum(s.nbytes() for s in storages.values()) == packed
        assert not [*part.parameters()]


MEMORY = """
    import resource
    import torch
    from torch import nn
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from fp4moe.models.replace import explain, replace_moe

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def peak():
        # Not ru_maxrss: that starts with what the parent process had.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    def experts(hidden_size, intermediate_size, count):
        config = MixtralConfig(
            hidden_size=hidden_size, intermediate_size=intermediate_size, num_local_experts=count
        )
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module = MixtralExperts(config).to(torch.bfloat16)
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.data[:] = torch.randn(parameter.shape[1:]) * 0.02
        return module

    # The first use of an operator loads code, which is not the memory of a layer.
    replace_moe(nn.ModuleList([experts(32, 32, 2)]), progress=False)
    for keep in (False, True):
        model = nn.ModuleList(experts(320, 512, 16) for _ in range(5))
        kept = [*model] if keep else []
        floats, before = explain(model).nbytes, resident()
        replace_moe(model, progress=False)
        print(floats, explain(model).nbytes, peak() - before, before - resident())
        del model
"""


@pytest.mark.slow
def test_peak_memory_stays_below_a_layer_and_the_rest_is_given_back():
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    # glibc then gives every large tensor back as soon as it is freed.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    layer = 16 * 3 * 320 * 512 * 2
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for floats, packed, *_ in lines:
        assert floats == 5 * layer
        assert floats / packed == pytest.approx(32 / 9, rel=0.001)
    (floats, packed, extra, freed), (_, _, extra_kept, freed_kept) = lines
    # Promised are two layers; it is one that is packed, and what one expert takes in float32.
    assert extra < layer
    assert freed > floats - packed - layer / 4
    # The same measurement where somebody keeps the float weights.
    assert extra_kept > layer
    assert freed_kept < 0


# The replaced model.


@pytest.mark.parametrize("build", [gemma4, nemotron_h, qwen3_moe])
def test_state_dict_moves_into_another_replaced_model(build):
    source, target = replaced(build), replace_moe(build(), progress=False)
    expected = logits(source)
    assert relative_error(logits(target), expected) > 1e-3
    places = [b.data_ptr() for part in fused_parts(target) for b in part.buffers()]
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(logits(target), expected)
    # Compiled graphs and CUDA graphs know these storages.
    assert [b.data_ptr() for part in fused_parts(target) for b in part.buffers()] == places


def test_state_dict_of_the_float_model_does_not_fit():
    model = replaced()
    before = fingerprint(model.get_submodule(FIRST))
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*{FIRST}\.gate_up_packed"):
        model.load_state_dict(qwen3_moe().state_dict())
    assert fingerprint(model.get_submodule(FIRST)) == before


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("build", [gemma4, nemotron_h])
def test_copies_compute_the_same_from_their_own_tensors(how, build):
    model = replaced(build)
    expected = logits(model)
    other = COPIES[how](model)
    assert torch.equal(logits(other), expected)
    assert str(explain(other)) == str(explain(model))
    for part in fused_parts(model):
        part.prepared_gate_up_packed.zero_()
        part.prepared_down_packed.zero_()
    assert relative_error(logits(model), expected) > 1e-3
    assert torch.equal(logits(other), expected)


CASTS = {
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16, 0.04),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16, 0.04),
    "to(float16)": (lambda m: m.to(torch.float16), torch.float16, 0.005),
}


@pytest.mark.parametrize("how", CASTS)
def test_casting_the_model_leaves_the_experts_dtypes_and_values(how):
    model = replaced()
    expected = logits(model)
    before = [[(n, b.dtype, b.clone()) for n, b in p.named_buffers()] for p in fused_parts(model)]
    cast, dtype, limit = CASTS[how]
    assert cast(model) is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    for part, old in zip(fused_parts(model), before, strict=True):
        for (name, kind, value), (new_name, buffer) in zip(old, part.named_buffers(), strict=True):
            assert (name, kind) == (new_name, buffer.dtype)
            assert torch.equal(value, buffer)
    assert logits(model).dtype == dtype
    assert relative_error(logits(model), expected) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_of_every_float_dtype_pack_to_the_same_codes(dtype):
    model = qwen3_moe(dtype=torch.bfloat16).to(dtype)
    if dtype == torch.float16:
        # Values that both hold exactly.
        for parameter in model.parameters():
            parameter.data = parameter.data.mul(256).round().div(256)
    expected = replace_moe(copy.deepcopy(model).float(), progress=False)
    replace_moe(model, progress=False)
    for part, other in zip(fused_parts(model), fused_parts(expected), strict=True):
        for buffer, value in zip(part.buffers(), other.buffers(), strict=True):
            assert torch.equal(buffer, value)
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training):
    model = replace_moe(qwen3_moe().train(training), progress=False)
    assert {m.training for m in model.modules()} == {training}
    mixed = qwen3_moe().train(training)
    mixed.get_submodule(LAST).train(not training)
    replace_moe(mixed, progress=False)
    assert [p.training for p in fused_parts(mixed)] == [training, not training]


def test_replacing_twice_changes_nothing():
    model = replaced()
    before = fingerprint(model)
    for kernel in ("auto", "reference"):
        assert replace_moe(model, kernel=kernel, progress=False) is model
    assert fingerprint(model) == before


def test_another_kernel_for_fused_blocks_is_refused_not_ignored():
    model = replaced()
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        replace_moe(model, kernel="reference_w4a4", progress=False)
    assert str(raised.value).startswith(
        "replace_moe: the blocks cannot get kernel 'reference_w4a4', because "
        f"{FIRST} is fused already, with 'reference'."
    )
    assert fingerprint(model) == before


def test_blocks_that_were_left_can_be_replaced_later():
    model = qwen3_moe()
    expected = logits(replace_moe(copy.deepcopy(model), progress=False))
    last = model.get_submodule(LAST)
    handle = last.register_forward_hook(lambda *args: None)
    replace_moe(model, strict=False, progress=False)
    first = model.get_submodule(FIRST)
    handle.remove()
    replace_moe(model, progress=False)
    assert model.get_submodule(FIRST) is first
    assert torch.equal(logits(model), expected)


def test_kernel_reference_w4a4_quantises_the_activations_too():
    model, exact = replaced(kernel="reference_w4a4"), replaced()
    assert [p.kernel for p in fused_parts(model)] == ["reference_w4a4"] * 2
    # The same weights, 4-bit activations: some 10 % a GEMM.
    for part, other in zip(fused_parts(model), fused_parts(exact), strict=True):
        for a, b in zip(part.buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b)
    assert 0.01 < relative_error(logits(model), logits(exact)) < 1.0
    hidden, ids = torch.randn(6, 64), torch.randint(8, (6, 2))
    part, weights = fused_parts(model)[0], torch.rand(6, 2)
    expected = reference_w4a4(hidden, part.weights, ids, weights)
    assert torch.equal(part(hidden, ids, weights), expected)


def test_method_mse_lowers_the_error_of_the_weights():
    errors = {}
    original = enlarge_experts(qwen3_moe())
    for method in ("max", "mse"):
        model = replace_moe(copy.deepcopy(original), progress=False, method=method)
        down = fused_parts(model)[1].weights.dequantize()["down"]
        errors[method] = relative_error(down, original.get_submodule(LAST).down_proj.detach())
    assert 0.03 < errors["mse"] < errors["max"] < 0.13


def test_one_expert_layer_and_every_activation_in_one_model():
    """Layers of one model may differ in every respect."""
    model = mixed_gates()
    hidden, ids, weights = torch.randn(6, 32), torch.zeros(6, 1).long(), torch.rand(6, 1)
    expected = [m(hidden, ids, weights).detach() for m in model]
    replace_moe(model, progress=False)
    assert [m.metadata["activation"] for m in model] == ["silu", "gelu_tanh", "gelu", "relu"]
    assert [m.metadata["num_experts"] for m in model] == [1, 2, 3, 4]
    for part, value in zip(model, expected, strict=True):
        assert 0.01 < relative_error(part(hidden, ids, weights), value) < 0.4
