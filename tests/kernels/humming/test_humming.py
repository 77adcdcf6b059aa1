"""Kernel `humming`: reasons, layout and arguments without a GPU; numbers and capture with one."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import pathlib

import pytest
import torch

from fp4moe import testing
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import base
from fp4moe.kernels.humming import library as humming_library
from fp4moe.kernels.humming.kernel import HUMMING
from fp4moe.kernels.humming.library import (
    GemmShape,
    compile_gemm,
    layer_arguments,
    library_reasons,
    pack_scales,
    pack_weights,
    toolchain_reasons,
    unpack_scales,
    unpack_weights,
)
from fp4moe.layer import Layer
from fp4moe.reference import reference

with_package = pytest.mark.skipif(
    humming_library.installed("humming-kernels") is None, reason="needs humming-kernels"
)
HOPPER, HEADERS = (9, 0), ("cuda_runtime.h", "nvrtc.h", "cccl/cuda/std/cstdint")


GPT_OSS = "silu(alpha=1.702,beta=1,limit=1)"


def make_weights(
    gated=True, experts=5, hidden=200, intermediate=72, device="cpu", biased=False, **options
):
    activation = options.pop("activation", "gelu_tanh" if gated else "relu2")
    shape = experts, hidden, intermediate
    return testing.make_layer(*shape, activation, gated, biased=biased, device=device, **options)


def make_layer(**changes):
    return dataclasses.replace(Layer("silu", True, 200, 72, 8, 2), **changes)


# Reasons


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        (None, "needs compute capability 7.5 to 9.0, got a CPU"),
        ((7, 0), "needs compute capability 7.5 to 9.0, got 7.0"),
        (
            (10, 0),
            "needs compute capability 7.5 to 9.0, got 10.0 (the layout there depends on the CUDA "
            "compiler)",
        ),
    ],
)
def test_a_device_is_refused_by_its_capability(capability, reason):
    assert HUMMING.reasons_not_to_run(make_layer(), capability) == [reason]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(humming_library, "installed", lambda package: None)
    (reason,) = HUMMING.reasons_not_to_run(make_layer(), HOPPER)
    assert reason.startswith("humming-kernels is not installed; run pip install 'humming-kernels[")


@pytest.mark.parametrize("version", ["0.1.18", "0.2.0"])
def test_an_unknown_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(humming_library, "installed", lambda package: version)
    (reason,) = library_reasons()
    assert f"humming-kernels {version} is not known, 0.1.19 and later 0.1 are" in reason


def test_missing_parts_are_named(monkeypatch):
    monkeypatch.setattr(humming_library, "installed", lambda package: "0.1.19")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    triton, bindings, cuda = library_reasons()
    assert triton.endswith("needs triton, which is not installed; run pip install triton")
    assert bindings.endswith("which is not installed; run pip install cuda-bindings")
    assert cuda.startswith("humming-kernels needs a torch built for CUDA, got ")


def toolkit(root: pathlib.Path, *missing: str, version: str = "13.0.1") -> pathlib.Path:
    for name in (*(f"include/{h}" for h in HEADERS), "lib64/libnvrtc.so.13"):
        if name.rpartition("/")[2] not in missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    (root / "version.json").write_text(f'{{"cuda": {{"version": "{version}"}}}}')
    return root


def test_the_toolchain_is_looked_for_in_every_folder(tmp_path):
    good = toolkit(tmp_path / "good")
    bare = toolkit(tmp_path / "bare", "nvrtc.h", "libnvrtc.so.13")
    old = toolkit(tmp_path / "old", version="12.8.0")
    assert toolchain_reasons([bare, old, good], "13") == []
    (reason,) = toolchain_reasons([bare, old], "13")
    assert f"needs the CUDA 13 toolkit: {bare} lacks nvrtc.h, libnvrtc.so; {old} is CUDA" in reason
    assert reason.endswith("run pip install 'humming-kernels[cu13]' or set CUDA_HOME")
    (reason,) = toolchain_reasons([], "13")
    assert "no folder of it was found" in reason


def test_a_toolchain_from_wheels_is_found(tmp_path):
    for name in ("cuda_runtime.h", "cuda/std/cstdint"):
        path = tmp_path / "cuda_runtime" / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (reason,) = toolchain_reasons([tmp_path], "12")
    assert "lacks nvrtc.h, libnvrtc.so;" in reason
    for name in ("include/nvrtc.h", "lib/libnvrtc.so.12"):
        path = tmp_path / "cuda_nvrtc" / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert toolchain_reasons([tmp_path], "12") == []


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "activation", [GPT_OSS, "silu_step(limit=7)", "silu_softcap(alpha=4,beta=25)"]
)
def test_parameters_and_biases_are_no_reason(activation, biased):
    layer = make_layer(activation=activation, biased=biased)
    assert HUMMING.reasons_not_to_run(layer, HOPPER) == list(library_reasons())


def test_sizes_are_padded_to_tiles():
    assert HUMMING.size_multiples(make_layer(), 512) == (128, 64)
    assert HUMMING.size_multiples(make_layer(gated=False), 512) == (128, 128)
    assert (
        HUMMING.reasons_without_padding(make_layer(hidden_size=2816, intermediate_size=704)) == []
    )
    gemma = make_layer(hidden_size=2816, intermediate_size=704)
    assert HUMMING.reasons_without_padding(gemma) == []
    assert (HUMMING.automatic, HUMMING.quantizes_activations) == (True, False)


# Layout


def repacked(codes: list[list[int]]) -> list[int]:
    """Words of one expert as the library's CUDA kernel writes them, thread by thread."""
    rows, columns = len(codes), len(codes[0])
    words = [0] * (rows * columns // 8)
    for row in range(rows):
        for column in range(columns):
            thread = row % 8 * 4 + column % 8 // 2
            nibble = column % 2 * 4 + row % 16 // 8 * 2 + column % 16 // 8
            place = column // 16 * rows * 2 + row // 64 * 128 + thread * 4 + row % 64 // 16
            words[place] |= codes[row][column] << 4 * nibble
    return words


@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (128, 80), (192, 48)])
def test_weights_lie_where_the_library_reads_them(rows, columns):
    packed = torch.randint(0, 256, (2, rows, columns // 2), dtype=torch.uint8)
    laid_out = pack_weights(packed)
    words = laid_out.reshape(2, -1).view(torch.int32)
    for expert in range(2):
        codes = torch.stack((packed[expert] & 15, packed[expert] >> 4), -1).flatten(1).tolist()
        assert (words[expert].long() & 0xFFFFFFFF).tolist() == repacked(codes)
    assert torch.equal(unpack_weights(laid_out), packed)


@pytest.mark.parametrize(("rows", "blocks"), [(64, 1), (192, 7)])
def test_scales_lie_where_the_library_reads_them(rows, blocks):
    scale = torch.randint(0, 127, (3, rows, blocks), dtype=torch.uint8)
    laid_out = pack_scales(scale)
    read = laid_out.view(3, blocks, rows)
    for place in range(rows):
        row = place // 64 * 64 + place % 8 * 8 + place % 64 // 8
        assert torch.equal(read[:, :, place], scale[:, row])
    assert torch.equal(unpack_scales(laid_out), scale)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_restore_undoes_prepare(gated, biased):
    weights = make_weights(gated, experts=3, hidden=24, intermediate=208, biased=biased)
    prepared = HUMMING.prepare(weights, hidden_alignment=256)
    assert prepared.operands.down_packed.shape == (3, 128, 128)
    if biased:
        assert prepared.operands.gate_up_bias.shape == prepared.operands.gate_up_packed.shape[:2]
    restored = HUMMING.restore(prepared)
    assert restored.metadata() == weights.metadata()
    for name, tensor in weights.unpadded().tensors().items():
        assert torch.equal(restored.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))


def test_restore_works_on_shapes_alone():
    prepared = HUMMING.prepare(make_weights(), hidden_alignment=256)
    blank = prepared.replaced({k: t.to("meta") for k, t in prepared.tensors().items()})
    assert HUMMING.restore(blank).gate_up.packed.shape == (5, 160, 104)


# Refusals at run time


def call(weights, hidden, **changes):
    prepared = HUMMING.prepare(weights, hidden_alignment=256)
    ids = torch.zeros(hidden.shape[0], 2, dtype=torch.int64)
    call = prepared.call(hidden, ids, torch.ones(ids.shape))
    return HUMMING(call._replace(operands=prepared.operands._replace(**changes)))


def test_a_cpu_is_refused():
    expected = "moe: kernel humming cannot run, because hidden is on cpu .* capability 7.5 to 9.0"
    with pytest.raises(UnsupportedError, match=expected):
        call(make_weights(), torch.zeros(3, 200))


@pytest.mark.parametrize(("rows", "columns", "what"), [(96, 128, "hidden"), (128, 80, "intermed")])
def test_operands_without_padding_are_refused(monkeypatch, rows, columns, what):
    monkeypatch.setattr(base, "query_capability", lambda device: HOPPER)
    down = torch.zeros(5, rows, columns // 2, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=f"moe: the padded {what}.* must be a multiple of"):
        call(make_weights(), torch.zeros(3, 64), down_packed=down)


def test_compiling_without_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(humming_library, "installed", lambda package: None)
    with pytest.raises(UnsupportedError, match=r"^moe: humming-kernels cannot be used, because"):
        compile_gemm(GemmShape(3, 128, 64, 0, 0), torch.bfloat16, 0)


# Arguments, against the package's sources: importing it starts processes and needs a GPU


def definition(file: str, name: str) -> ast.AST:
    (folder,) = importlib.util.find_spec("humming").submodule_search_locations
    tree = ast.parse((pathlib.Path(folder) / file).read_text("utf-8"))
    (found,) = (n for n in ast.walk(tree) if getattr(n, "name", "") == name)
    return found


@with_package
def test_layer_arguments_are_fields_of_the_layer():
    fields = {
        n.target.id
        for n in definition("config/config.py", "LayerConfig").body
        if isinstance(n, ast.AnnAssign)
    }
    assert set(layer_arguments(GemmShape(1, 128, 64, 0, 0), torch.bfloat16)) <= fields


@with_package
@pytest.mark.parametrize(
    ("file", "name", "wanted"),
    [
        (
            "ops/launcher.py",
            "launch_kernel",
            "configs inputs outputs weight weight_scale weight_scale_2 top_k valid_shape_m "
            "sorted_ids expert_ids num_tokens_padded",
        ),
        ("tune/__init__.py", "get_heuristics_config", "gemm_type use_batch_invariant device"),
        (
            "kernel/humming.py",
            "prepare_kernels",
            "layer_config compute_config tuning_config device",
        ),
    ],
)
def test_functions_take_the_arguments_that_are_passed(file, name, wanted):
    arguments = definition(file, name).args
    assert set(wanted.split()) <= {a.arg for a in arguments.args + arguments.kwonlyargs}


# On a GPU


def routing(tokens, experts, top_k, device):
    ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :top_k]
    return ids, torch.rand(tokens, top_k, device=device).softmax(1)


def check_close(got, expected):
    # Gate, up, their product, the second GEMM and the result are rounded to bfloat16. One rounding
    # is 2^-8 / sqrt(3) = 2.3e-3 relative RMS at worst, 1.6e-3 over all mantissas; five are 5.0e-3
    # at worst, 3.5e-3 on average. The sums in float32 add less than a tenth.
    error = (got.float() - expected.float()).square().mean().sqrt()
    assert error <= 6e-3 * expected.float().square().mean().sqrt()


gpu = pytest.mark.gpu


@gpu
@with_package
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 64, 257])
def test_numbers_are_those_of_the_reference(tokens, gated):
    weights = make_weights(gated, experts=9, device="cuda")
    prepared = HUMMING.prepare(weights, hidden_alignment=256)
    hidden = torch.randn(tokens, 200, device="cuda", dtype=torch.bfloat16)
    ids, scores = routing(tokens, 9, 3, "cuda")
    got = HUMMING(prepared.call(hidden, ids, scores))
    again = HUMMING(prepared.call(hidden, ids.int(), scores))
    check_close(got, reference(hidden, weights, ids, scores))
    assert torch.equal(got, again)


@gpu
@with_package
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("kind", ["one expert", "none here", "window", "odd hidden", "float16"])
def test_numbers_of_odd_routings_and_inputs(kind):
    size = 203 if kind == "odd hidden" else 200
    weights = make_weights(experts=9, hidden=size, device="cuda")
    ids, scores = routing(33, 9, 3, "cuda")
    if kind == "one expert":
        ids = torch.full_like(ids, 4)
    if kind in ("window", "none here"):
        weights = weights.slice_experts(5, 8)
    if kind == "none here":
        ids = ids % 5
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    hidden = torch.randn(33, size, device="cuda", dtype=dtype)
    prepared = HUMMING.prepare(weights, hidden_alignment=256)
    got = HUMMING(prepared.call(hidden, ids, scores))
    assert got.dtype == dtype
    check_close(got, reference(hidden, weights, ids, scores))


@gpu
@with_package
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("tokens", [7, 257])
@pytest.mark.parametrize(
    ("activation", "biased"),
    [
        (GPT_OSS, True),
        (GPT_OSS, False),
        ("silu_step(limit=0.5)", True),
        ("silu_softcap(alpha=2,beta=1.5)", True),
        ("relu2", True),
    ],
)
def test_parameters_and_biases_on_the_gpu(tokens, activation, biased):
    gated = activation != "relu2"
    weights = make_weights(gated, 9, device="cuda", biased=biased, activation=activation)
    # The biases of the slice start inside others.
    weights = weights.slice_experts(5, 8)
    hidden = torch.randn(tokens, 200, device="cuda", dtype=torch.bfloat16)
    ids, scores = routing(tokens, 9, 3, "cuda")
    got = HUMMING(HUMMING.prepare(weights, hidden_alignment=256).call(hidden, ids, scores))
    check_close(got, reference(hidden, weights, ids, scores))


@gpu
@with_package
@pytest.mark.parametrize(("top_k", "biased"), [(1, False), (3, False), (6, False), (3, True)])
def test_the_first_run_may_be_captured(top_k, biased):
    # Sizes that no other test has, so that nothing was compiled for them before.
    size = 264 + 8 * top_k + 64 * biased
    weights = make_weights(experts=6, hidden=size, device="cuda", biased=biased)
    prepared = HUMMING.prepare(weights, hidden_alignment=256)
    hidden = torch.randn(5, size, device="cuda", dtype=torch.bfloat16)
    ids, scores = routing(5, 6, top_k, "cuda")
    ids = ids.int() if biased else ids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = HUMMING(prepared.call(hidden, ids, scores))
    hidden.copy_(torch.randn_like(hidden))
    ids.copy_(ids.roll(1, 0))
    graph.replay()
    check_close(out, reference(hidden, weights, ids, scores))


@gpu
@with_package
def test_weights_are_laid_out_as_by_the_library():
    from humming import ops

    packed = torch.randint(0, 256, (3, 192, 80), dtype=torch.uint8, device="cuda")
    theirs = ops.repack_weight(packed.view(torch.int32), 4, 16, True)
    assert torch.equal(pack_weights(packed).flatten(), theirs.view(torch.uint8).flatten())
