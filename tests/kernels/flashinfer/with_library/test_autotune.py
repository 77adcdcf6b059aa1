"""`fp4moe.autotune` with FlashInfer's own tuner; only the kernels that it times are emulated."""

from __future__ import annotations

import json

import pytest
import torch
from flashinfer_contract import takes
from flashinfer_formats_layers import GIVEN
from flashinfer_formats_layers import layer as formats_layer
from fused_layers import layer, tokens
from tiny_models import family, fingerprint, gemma4, qwen3_moe
from torch import nn

from fp4moe import FusedExperts, explain, replace_moe
from fp4moe.errors import CheckpointError, ShapeError, UnsupportedError
from fp4moe.kernels.flashinfer.library import (
    flashinfer_settings,
    is_tuning,
    library,
    set_flashinfer,
)
from fp4moe.models.autotune import autotune, cache_stamp

pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
ROUTED = "trtllm_fp4_block_scale_routed_moe"


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))
    yield
    set_flashinfer()


def model() -> nn.ModuleList:
    """Three layers of two kinds."""
    return nn.ModuleList(
        [
            FusedExperts(layer(), top_k=2),
            FusedExperts(layer(seed=4), top_k=2),
            FusedExperts(layer(activation="gelu_tanh"), top_k=2),
        ]
    )


def test_one_call_for_each_kind_of_layer(emulated):
    emulated.tune_max_num_tokens = 64
    assert autotune(model(), max_tokens=50) == 2
    assert flashinfer_settings().tune_max_num_tokens == 64
    calls = emulated.of(ROUTED)
    assert [call["hidden_states"].shape[0] for call in calls] == [50, 50]
    assert not is_tuning()
    # Later calls say the same number, or the tuner would look for another entry.
    experts = FusedExperts(layer())
    experts(*tokens(3, layer()))
    assert emulated.of(ROUTED)[-1]["tune_max_num_tokens"] == 64


def test_a_float_model_is_tuned_on_random_layers_of_its_sizes(emulated):
    float_model = gemma4()
    before = fingerprint(float_model)
    assert autotune(float_model, max_tokens=4) == 1
    assert fingerprint(float_model) == before
    (call,) = emulated.of(ROUTED)
    block = explain(float_model).blocks[0]
    assert call["num_experts"] == block.num_experts and call["top_k"] == block.top_k
    assert call["gemm2_weights"].shape[1] == block.padded_sizes[0]


@pytest.mark.parametrize("format", ["fp8_block", "mxfp8", "mxfp4"])
def test_a_float_model_is_tuned_in_the_format_that_it_will_have(emulated, format):
    float_model = qwen3_moe()
    before = fingerprint(float_model)
    assert autotune(float_model, max_tokens=4, format=format) == 1
    assert fingerprint(float_model) == before
    block = explain(float_model, format=format).blocks[0]
    (call,) = emulated.of(GIVEN[format])
    assert call["gemm2_weights"].shape[1] == block.padded_sizes[0]
    emulated.calls.clear()
    assert autotune(replace_moe(float_model, format=format, progress=False), max_tokens=4) == 1
    (same,) = emulated.of(GIVEN[format])
    assert {k: described(v) for k, v in call.items()} == {k: described(v) for k, v in same.items()}


def described(value):
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else type(value)


def test_biases_of_a_float_model_are_tuned_with_it(emulated):
    float_model = family("gpt_oss")
    assert autotune(float_model, max_tokens=4, format="mxfp4") == 1
    (call,) = emulated.of(GIVEN["mxfp4"])
    assert call["gemm1_bias"].abs().max() > 0 and call["gemm2_bias"].abs().max() > 0


def test_formats_of_one_size_are_layers_of_their_own(emulated):
    both = nn.ModuleList(
        FusedExperts(formats_layer(format), top_k=2) for format in ("mxfp8", "mxfp4", "mxfp8")
    )
    assert autotune(both, max_tokens=4) == 2


def test_the_tuner_sees_what_it_tunes(emulated, monkeypatch):
    """0.6.13 makes packed random ids whatever it was called with, so it is called with those."""
    seen = []
    real = library().module.autotune
    tuner = lambda *args, **kwargs: seen.append(args) or real(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(library().module, "autotune", tuner)
    autotune(FusedExperts(layer(), top_k=2), max_tokens=8)
    assert seen == [(True,)]
    (call,) = emulated.of(ROUTED)
    assert isinstance(call["topk_ids"], tuple) == library().tunes_plain_ids
    FusedExperts(layer())(*tokens(2, layer()))
    assert isinstance(emulated.of(ROUTED)[-1]["topk_ids"], tuple)


def test_cache_and_its_versions(emulated, tmp_path):
    path = tmp_path / "tune.json"
    experts = FusedExperts(layer(), top_k=2)
    autotune(experts, max_tokens=8, cache=path)
    stamp = json.loads((tmp_path / "tune.json.versions.json").read_text())
    assert stamp == cache_stamp(torch.device("cpu"))
    assert stamp["flashinfer-python"] == library().version and stamp["capability"] == [10, 0]
    path.write_text("{}")
    assert autotune(experts, max_tokens=8, cache=path) == 1
    (tmp_path / "tune.json.versions.json").write_text(json.dumps(stamp | {"torch": "1.0"}))
    with pytest.raises(CheckpointError) as refusal:
        autotune(experts, max_tokens=8, cache=path)
    assert str(refusal.value) == (
        f"autotune: cache must be of this GPU and these versions; got torch 1.0 (now "
        f"{torch.__version__}). Pass another path, or delete {path}."
    )
    (tmp_path / "tune.json.versions.json").unlink()
    with pytest.raises(CheckpointError, match=r"^autotune: cache must have its tune.json.versions"):
        autotune(experts, max_tokens=8, cache=path)


def test_refusals(emulated, claim):
    with pytest.raises(ShapeError, match=r"^autotune: max_tokens must be at least 1; got 0\."):
        autotune(FusedExperts(layer(), top_k=2), max_tokens=0)
    with pytest.raises(ShapeError, match=r"^autotune: every layer must know its top_k; got Fused"):
        autotune(FusedExperts(layer()))
    with pytest.raises(
        UnsupportedError, match=r"^autotune: .* cannot be tuned.* none, .* Move the mod"
    ):
        autotune(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"^autotune: format must be one of .* got 'int4'"):
        autotune(qwen3_moe(), format="int4")
    # GeGLU has kernels in NVFP4 alone.
    with pytest.raises(UnsupportedError, match=r"^autotune: .* cannot be tuned"):
        autotune(gemma4(), format="mxfp8")
    claim(None)
    with pytest.raises(UnsupportedError, match=r"kernels \['reference'\], and only .* Move the"):
        autotune(FusedExperts(layer(), top_k=2))
    assert emulated.calls == []


def test_cutlass_is_tuned_where_its_sum_stays_in_order(emulated, claim):
    claim((12, 0))
    experts = FusedExperts(layer(), top_k=2)
    assert experts.kernel == "flashinfer_cutlass"
    if takes("cutlass_fused_moe", "use_fused_finalize"):
        assert autotune(experts, max_tokens=4) == 1
        assert emulated.of("cutlass_fused_moe")[0]["use_fused_finalize"] is False
    else:
        with pytest.raises(
            UnsupportedError, match=r"flashinfer_cutlass needs FlashInfer 0\.6\.15 or newer\.$"
        ):
            autotune(experts, max_tokens=4)


def test_an_error_inside_ends_the_tuning(emulated, monkeypatch):
    monkeypatch.setattr(FusedExperts, "forward", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        autotune(FusedExperts(layer(), top_k=2), max_tokens=8)
    assert not is_tuning()
