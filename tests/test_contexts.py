"""The caller's default dtype and device do not matter: results are equal to the bit."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from checkpoint_makers import load_tensors, save_float
from loop_models import H, MixtralOld, OlmoeOld, make_model
from tiny_models import enlarge_experts, nemotron_h, qwen3_moe
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fp4moe
from fp4moe.experts import ExpertWeights
from fp4moe.formats.nvfp4 import NVFP4Values

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))
MODELS = {"qwen3_moe": qwen3_moe, "nemotron_h": nemotron_h}
LOOPS = {"mixtral": MixtralOld, "olmoe": OlmoeOld}


class DefaultCuda(TorchFunctionMode):
    """Refuses what a default device "cuda" refuses: a CPU generator where no device is named."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        nowhere = func in _device_constructors() and kwargs.get("device") is None
        if nowhere and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator: {func.__name__}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "bfloat16": functools.partial(default_dtype, torch.bfloat16),
    "float16": functools.partial(default_dtype, torch.float16),
    "float64": functools.partial(default_dtype, torch.float64),
    "meta context": functools.partial(torch.device, "meta"),
    "meta default": functools.partial(default_device, "meta"),
    "cuda": DefaultCuda,
}


@functools.cache
def built(name):
    if name in LOOPS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make_model(LOOPS[name])
    model = enlarge_experts(MODELS[name]()).eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True
    return model


@functools.cache
def weights_of(name):
    """The two projections of a model's first experts, [E, N, K]."""
    return [p for n, p in built(name).named_parameters() if ".experts." in n][:2]


def packed(name):
    first, down = weights_of(name)
    if name != "nemotron_h":
        gate, up = first.chunk(2, 1)
        return ExpertWeights.quantize(gate=gate, up=up, down=down, activation="silu")
    return ExpertWeights.quantize(up=first, down=down, activation="relu2")


def quantize(name, method):
    return functools.partial(fp4moe.quantize_nvfp4, weights_of(name)[0], method=method)


def quantize_scaled(name):
    return functools.partial(fp4moe.quantize_nvfp4, weights_of(name)[0], 0.01)


def dequantize(name, dtype):
    return functools.partial(
        fp4moe.dequantize_nvfp4, fp4moe.quantize_nvfp4(weights_of(name)[0]), dtype
    )


def quantize_experts(name):
    weights_of(name)
    return functools.partial(packed, name)


def run_experts(name):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 64, generator=generator)
    ids = torch.rand(7, 8, generator=generator).argsort(1)[:, :2].contiguous()
    routing = torch.rand(7, 2, generator=generator)
    return functools.partial(fp4moe.fused_moe, hidden, packed(name), ids, routing)


def replace(name, **options):
    return functools.partial(
        fp4moe.replace_moe, copy.deepcopy(built(name)), progress=False, **options
    )


def explain(name):
    return lambda: str(fp4moe.explain(built(name)))


def calibrate(name, percentile):
    model = copy.deepcopy(built(name))

    def act():
        with fp4moe.calibrate(model, percentile=percentile), torch.no_grad():
            model(IDS)
        return fp4moe.replace_moe(model, progress=False)

    return act


def first_call(name):
    model = copy.deepcopy(built(name))
    model.set_experts_implementation("fp4moe")

    def act():
        with torch.no_grad():
            model(IDS)
        return model

    return act


def compiled(name, backend, **options):
    path = next(n for n, _ in built(name).named_parameters() if ".experts." in n)
    block = copy.deepcopy(built(name).get_submodule(path[: path.index(".experts.")]))
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))

    def act():
        torch.compiler.reset()
        with torch.no_grad():
            return torch.compile(block, backend=backend, **options)(hidden)

    return act


def by_backend(name, routing):
    options = {"inner_backend": "eager", "on_no_match": "error", "routing": routing}
    return compiled(name, fp4moe.backend, options=options)


def by_pass(name):
    return compiled(name, "inductor", options=fp4moe.inductor_options(on_no_match="error"))


ENTRIES = {
    "quantize max": functools.partial(quantize, method="max"),
    "quantize mse": functools.partial(quantize, method="mse"),
    "quantize scaled": quantize_scaled,
    "dequantize float32": functools.partial(dequantize, dtype=torch.float32),
    "dequantize bfloat16": functools.partial(dequantize, dtype=torch.bfloat16),
    "dequantize float16": functools.partial(dequantize, dtype=torch.float16),
    "ExpertWeights": quantize_experts,
    "fused_moe": run_experts,
    "replace_moe": replace,
    "replace_moe routing": functools.partial(replace, routing="fused"),
    "explain": explain,
    "calibrate": functools.partial(calibrate, percentile=None),
    "calibrate percentile": functools.partial(calibrate, percentile=99.0),
    "experts_implementation": first_call,
}
COMPILED = {
    "backend": functools.partial(by_backend, routing="given"),
    "backend routing": functools.partial(by_backend, routing="fused"),
    "inductor_options": by_pass,
}


def content(result):
    """What is compared of a result: tensors by name, or a text."""
    if isinstance(result, torch.nn.Module):
        # Not every tensor of the kernel has a key in state_dict.
        tensors = dict(result.named_buffers(remove_duplicate=False))
        tensors |= dict(result.named_parameters(remove_duplicate=False))
        hidden = torch.ones(1, 5, H) + torch.arange(5.0).unsqueeze(-1)
        with torch.no_grad():
            out = result(IDS).logits if hasattr(result, "config") else result(hidden)
        return tensors | {"": out}
    if isinstance(result, ExpertWeights):
        return result.tensors()
    if isinstance(result, NVFP4Values):
        return {name: getattr(result, name) for name in ("packed", "block_scale", "global_scale")}
    return {"": result} if isinstance(result, torch.Tensor) else result


def assert_same(actual, expected):
    if isinstance(expected, str):
        assert actual == expected
        return
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].device == tensor.device, name
        bits = [t.detach().reshape(-1).view(torch.uint8) for t in (actual[name], tensor)]
        assert torch.equal(*bits), name


@functools.cache
def usual(entry, name):
    """What an entry gives under the float32 default."""
    return content((ENTRIES | COMPILED)[entry](name)())


def check(setting, entry, name):
    expected = usual(entry, name)
    act = (ENTRIES | COMPILED)[entry](name)
    with SETTINGS[setting]():
        result = act()
    assert_same(content(result), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_defaults_do_not_matter(setting, entry, name):
    check(setting, entry, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("entry", ["replace_moe", "explain"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_defaults_do_not_matter_to_experts_in_a_module_list(setting, entry, name):
    check(setting, entry, name)


@pytest.mark.slow
@pytest.mark.parametrize("entry", COMPILED)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_defaults_do_not_matter_to_compiling(setting, entry, fresh_dynamo):
    # Each setting and each way meets both models.
    number = list(SETTINGS).index(setting) + list(COMPILED).index(entry)
    check(setting, entry, ("qwen3_moe", "nemotron_h")[number % 2])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories by (model, form)."""
    found = {}
    for name in ("qwen3_moe", "nemotron_h"):
        for form in ("bfloat16", "NVFP4"):
            found[name, form] = tmp_path_factory.mktemp(name) / form
        save_float(name, found[name, "bfloat16"])
        fp4moe.quantize_checkpoint(found[name, "bfloat16"], found[name, "NVFP4"], progress=False)
    return found


def load(directory):
    return fp4moe.from_pretrained(directory, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bfloat16", "NVFP4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_the_defaults_do_not_matter_to_loading(name, form, checkpoints):
    expected = content(load(checkpoints[name, form]))
    for setting in SETTINGS:
        with SETTINGS[setting]():
            if setting.startswith("meta"):
                # transformers itself loads nothing there.
                with pytest.raises(RuntimeError, match="meta device"):
                    load(checkpoints[name, form])
                continue
            model = load(checkpoints[name, form])
        assert_same(content(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_the_defaults_do_not_matter_to_writing(name, checkpoints, tmp_path):
    written = load_tensors(checkpoints[name, "NVFP4"])
    layers = {key.partition(".experts.")[0] + ".experts" for key in written if ".experts." in key}
    ranges = {layer: (0.1, 0.3) for layer in layers}

    def write(target):
        fp4moe.quantize_checkpoint(
            checkpoints[name, "bfloat16"], target, calibration=ranges, progress=False
        )

    write(tmp_path / "usual")
    expected = load_tensors(tmp_path / "usual")
    assert any(key.endswith("input_scale") for key in expected)
    for setting in SETTINGS:
        with SETTINGS[setting]():
            write(tmp_path / setting)
        assert_same(load_tensors(tmp_path / setting), expected)
