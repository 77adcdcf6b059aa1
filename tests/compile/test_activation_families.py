"""Families whose experts have biases or clamped activations, compiled in one graph.

The float twin holds the dequantised values of the packed weights and runs Hugging Face's own loop.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import (
    COMMON,
    EXPERTS,
    LATENT,
    ROUTED,
    TOKENS,
    Block,
    CapturingBackend,
    family,
    finish,
    routed,
)
from transformers.integrations.moe import use_experts_implementation

import fp4moe
from fp4moe.experts import ExpertWeights, split_gate_up
from fp4moe.passes import rewrite_exported

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GPT_OSS = "silu(alpha=1.702,beta=1,limit=1.5)"
SPARSE = {"mlp_layer_types": ["sparse"] * 2}
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4}
KDA = {"linear_head_dim": 16, "linear_num_heads": 4, "hc_mult": 2}
GLM = {
    **{**ROUTED, **TOKENS, **LATENT, **SPARSE, **INDEXED, **KDA},
    **{"n_shared_experts": 1, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "head_dim": 16},
    **{"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full"] * 2},
}
BEAM = {**EXPERTS, **TOKENS, **SPARSE, "n_group": 1, "topk_group": 1}
# Family -> what the report says of its experts, and those that `tiny_models` does not have.
FORMS = {
    "gpt_oss": f"gated (gate_up_interleaved) {GPT_OSS}, transposed weights, biases",
    "privacy_filter": f"gated (gate_up) {GPT_OSS}, transposed weights, biases",
    "minimax_m3": f"gated (gate_up) {GPT_OSS}",
    "deepseek_v4": "gated (gate_up) silu(limit=10)",
    "hy_v4": "gated (gate_up) silu(limit=1.5)",
    "glm5_next": "gated (gate_up) silu(limit=10)",
    "inkling2": "gated (gate_up) silu_softcap(alpha=4,beta=25)",
    "beam": "gated (gate_up) silu",
}
DEEPSEEK = {**ROUTED, "mlp_layer_types": ["hash_moe", "moe"]}
OTHERS = {
    "beam": ("BeamForCausalLM", BEAM),
    "deepseek_v4": ("DeepseekV4ForCausalLM", DEEPSEEK),
    "glm5_next": ("Glm5NextTextModel", GLM),
}
IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71], [3, 88, 9, 120, 54, 31, 77, 6, 45]])


def form_of(name, model):
    """What the report says of this model's experts; older versions have limits of their own."""
    limit = getattr(experts_of(model)[0], "limit", 1.5)
    return FORMS[name].replace("limit=1.5", f"limit={limit:g}")


def experts_of(model):
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter)
    ]


def large(experts):
    """Give experts weights on which limits of 7 and 10 are met; biases of unit size."""
    generator = torch.Generator().manual_seed(1)
    transposed = getattr(experts, "is_transposed", False)
    for name, part in experts.named_parameters():
        values = torch.randn(part.shape, generator=generator)
        if part.ndim == 3:
            gain = 8 if name == "gate_up_proj" else 1
            values *= gain * part.shape[1 if transposed else 2] ** -0.5
        part.data.copy_(values)
    return experts


def build(name, implementation="grouped_mm"):
    if name in OTHERS:
        class_name, settings = OTHERS[name]
        if not hasattr(transformers, class_name):
            pytest.skip(f"{name} is not in transformers {transformers.__version__}")
        if name == "glm5_next" and Version(transformers.__version__) < Version("5.23"):
            pytest.skip("its configuration had other types of layers")
        model_class = getattr(transformers, class_name)
        config = model_class.config_class(**{**COMMON, "num_hidden_layers": 2, **settings})
        model = finish(model_class, config, implementation, torch.float32)
    else:
        model = family(name, implementation)
    for experts in experts_of(model):
        large(experts)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("tid2eid"):
            # DeepSeek-V4's first layers know each token's experts.
            generator = torch.Generator().manual_seed(2)
            order = torch.rand(len(buffer), 8, generator=generator).argsort(1)
            buffer.copy_(order[:, : buffer.shape[1]])
    return model.requires_grad_(False)


def twin_of(model):
    """The same with weights that NVFP4 holds, on Hugging Face's loop."""
    twin = copy.deepcopy(model)
    for experts in experts_of(twin):
        transposed = getattr(experts, "is_transposed", False)
        first, down = experts.gate_up_proj, experts.down_proj
        first, down = (first.mT, down.mT) if transposed else (first, down)
        layout = "gate_up"
        if not getattr(experts, "is_concatenated", True):
            layout = "gate_up_interleaved"
        held = ExpertWeights.quantize(
            gate_up=first, down=down, layout=layout, activation="silu"
        ).dequantize()
        # Views of the rows of gate and of up, whatever their order.
        for half, name in zip(split_gate_up(first, layout), ("gate", "up"), strict=True):
            half.data.copy_(held[name])
        down.data.copy_(held["down"])
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")
    return twin


def logits(model):
    with torch.no_grad():
        out = model(IDS, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# Both sum the same float32 products, at most 96 of them, in another order: 6e-8 * sqrt(96) a GEMM
# if every rounding counts. A layer passes its error on about once: two layers, doubled.
LIMIT = 4e-6


def compiled(model, inner="eager", **options):
    options = {"kernel": "reference", "on_no_match": "error", "inner_backend": inner, **options}
    return torch.compile(model, backend=fp4moe.backend, fullgraph=True, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_compiled_is_the_model_with_dequantised_weights(name, caplog):
    model = build(name)
    expected, before = logits(twin_of(model)), logits(model)
    inner = CapturingBackend()
    with caplog.at_level("INFO", logger="fp4moe"):
        actual = logits(compiled(model, inner))
    (graph,) = inner.graphs
    layers = len(experts_of(model))
    fp4 = torch.ops.fp4moe
    operator = fp4.moe if "biases" in FORMS[name] else fp4.nvfp4_moe
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(operator.default) == layers > 0
    assert caplog.text.count(f"  {form_of(name, model)}  ") == layers
    assert error(actual, expected) < LIMIT
    # The check would see the weights' own rounding.
    assert error(before, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v4"])
def test_other_implementation(name):
    model = build(name, "batched_mm")
    assert error(logits(compiled(model)), logits(twin_of(model))) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("way", ["backend", "inductor_options"])
def test_inductor(way):
    experts = experts_of(build("gpt_oss"))[0]
    model, given = Block(lambda _config: experts), routed(9)
    model.experts.config._experts_implementation = "grouped_mm"
    if way == "backend":
        fast = compiled(model, "inductor")
    else:
        settings = {"kernel": "reference", "on_no_match": "error"}
        fast = torch.compile(model, fullgraph=True, options=fp4moe.inductor_options(**settings))
    with torch.no_grad():
        twin = twin_of(Block(lambda _config: copy.deepcopy(experts)))
        twin.experts.config._experts_implementation = "eager"
        assert error(fast(*given), twin(*given)) < LIMIT


@pytest.mark.parametrize("name", ["gpt_oss", "inkling2"])
def test_exported(name):
    experts = experts_of(build(name))[0]
    model, given = Block(lambda _config: experts), routed(9)
    program, report = rewrite_exported(torch.export.export(model, given), kernel="reference")
    assert report.blocks[0].form == form_of(name, model)
    twin = twin_of(model)
    twin.experts.config = SimpleNamespace(_experts_implementation="eager")
    assert error(program.module()(*given), twin(*given)) < LIMIT


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23"
)
@pytest.mark.parametrize("limit", [7.0, None])
def test_step3p7(limit):
    # Its own loop over the experts that are hit breaks the graph; its formula does not.
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    stamped = use_experts_implementation(type("Stamped", (Step3p7Experts,), {}))
    sizes = {"num_local_experts": 8, "hidden_size": 64, "moe_intermediate_size": 48}

    def make(config):
        config = SimpleNamespace(**vars(config), **sizes, hidden_act="silu")
        return large(stamped(config, swiglu_limit=limit))

    model, given, inner = Block(make), routed(9), CapturingBackend()
    with torch.no_grad():
        actual = compiled(model, inner)(*given)
        twin = twin_of(model)
        assert error(actual, Step3p7Experts.forward(twin.experts, *given)) < LIMIT
    fp4 = torch.ops.fp4moe
    (node,) = (n for n in inner.graphs[0].graph.nodes if n.target is fp4.nvfp4_moe.default)
    assert ("silu_step(limit=7)" if limit else "silu") in node.args


@pytest.mark.slow
def test_muse_spark_is_left_and_says_what_is_closest():
    model = build("muse_spark")
    with pytest.warns(UserWarning, match=r"closest is gated \(gate_up\) silu.* with relative err"):
        actual = logits(compiled(model, on_no_match="warn"))
    assert torch.equal(actual, logits(model))
