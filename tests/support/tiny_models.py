"""Small random models of the real transformers classes, for tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fp4moe.identity import table as identity

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def finish(model_class, config, implementation, dtype):
    """Build the model from a fixed seed, with unlike layers and routing that is not uniform."""
    config._experts_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    return model.to(dtype).eval()


def gemma4(implementation="grouped_mm", dtype=torch.float32):
    """Two MoE layers beside dense ones, gated gelu_tanh."""
    config = Gemma4TextConfig(
        **COMMON,
        num_experts=8,
        top_k_experts=2,
        enable_moe_block=True,
        num_hidden_layers=2,
        global_head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    return finish(Gemma4ForCausalLM, config, implementation, dtype)


def nemotron_h(implementation="grouped_mm", dtype=torch.float32, latent=None):
    """Mamba, MoE, attention, MoE; relu2, not gated; optional latent projection."""
    config = NemotronHConfig(
        **COMMON,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        moe_shared_expert_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_latent_size=latent,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
    )
    return finish(NemotronHForCausalLM, config, implementation, dtype)


def nemotron_h_latent(implementation="grouped_mm", dtype=torch.float32):
    """NemotronH whose experts work at half the hidden size."""
    return nemotron_h(implementation, dtype, latent=32)


def qwen3_moe(implementation="grouped_mm", dtype=torch.float32):
    """Two MoE layers, gated silu."""
    config = Qwen3MoeConfig(**COMMON, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2)
    return finish(Qwen3MoeForCausalLM, config, implementation, dtype)


MODELS = {
    "gemma4": gemma4,
    "nemotron_h": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}

# What most families call the number of experts and of those that a token chooses.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK = {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1}
# Multi-head latent attention.
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
SHARED = {"shared_expert_intermediate_size": 48}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
# Both layers of experts; and limits that values of unit size reach.
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
LIMIT = {"swiglu_limit": 1.5}
GLM5 = {
    "head_dim": 0,
    "qk_rope_head_dim": 0,
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_types": ["full", "full"],
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "index_topk": 32,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "hc_mult": 2,
}
# Model class, and what its configuration takes beyond COMMON.
FAMILIES = {
    "afmoe": ("AfmoeForCausalLM", {**EXPERTS, "num_dense_layers": 1}),
    "beam": ("BeamForCausalLM", {**EXPERTS, **SPARSE, "n_group": 1, "topk_group": 1}),
    "aria": ("AriaTextForCausalLM", {"moe_num_experts": 8, "moe_topk": 2}),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {**EXPERTS, **TOKENS}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK | LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK | LATENT),
    "deepseek_v4": ("DeepseekV4ForCausalLM", ROUTED | LIMIT),
    "dots1": ("Dots1ForCausalLM", DEEPSEEK),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 8, "moe_k": 2}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {**EXPERTS, "first_k_dense_replace": 1}),
    "flex_olmo": ("FlexOlmoForCausalLM", {**EXPERTS, **TOKENS}),
    "glm4_moe": ("Glm4MoeForCausalLM", DEEPSEEK),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", DEEPSEEK | LATENT),
    "glm5_next": ("Glm5NextTextModel", ROUTED | LATENT | GLM5 | SPARSE | LIMIT),
    "gpt_oss": ("GptOssForCausalLM", {**LOCAL, **TOKENS, **LIMIT}),
    "granitemoe": ("GraniteMoeForCausalLM", LOCAL),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", LOCAL | {"shared_intermediate_size": 48}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {"num_experts": 8, "moe_topk": 2}),
    "hy_v4": ("HYV4ForCausalLM", {**LOCAL, **TOKENS, **LIMIT}),
    "inkling2": ("Inkling2ForCausalLM", {**ROUTED, **TOKENS, "unpadded_vocab_size": 128}),
    "jamba": ("JambaForCausalLM", EXPERTS | JAMBA),
    "kolibri1": ("Kolibri1ForCausalLM", EXPERTS),
    "laguna": ("LagunaForCausalLM", EXPERTS | SHARED),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    ),
    "mellum": ("MellumForCausalLM", EXPERTS),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", DEEPSEEK),
    "minimax": ("MiniMaxForCausalLM", LOCAL),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**LOCAL, **TOKENS}),
    "minimax_m3": ("MiniMaxM3VLForCausalLM", {**LOCAL, **TOKENS, **LIMIT}),
    "mixtral": ("MixtralForCausalLM", LOCAL),
    "muse_spark": ("MuseSparkTextModel", {**LOCAL, **TOKENS, "moe_hidden_size": 32}),
    "olmoe": ("OlmoeForCausalLM", {**EXPERTS, **TOKENS}),
    "phimoe": ("PhimoeForCausalLM", LOCAL),
    "privacy_filter": ("OpenAIPrivacyFilterModel", {**LOCAL, **TOKENS, **LIMIT}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", EXPERTS | SHARED),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", EXPERTS | SHARED | LINEAR),
    "qwen3_next": ("Qwen3NextForCausalLM", EXPERTS | SHARED | LINEAR),
    "solar_open": ("SolarOpenForCausalLM", DEEPSEEK),
    "step3p7": (
        "Step3p7TextModel",
        {**LOCAL, **SPARSE, "n_routed_experts": 8, "share_expert_dim": 48}
        | {"sliding_window": 32, "swiglu_limits": [0.0, 1.5]},
    ),
    "zaya": ("ZayaForCausalLM", EXPERTS | {"num_experts_per_tok": 1, "router_hidden_size": 32}),
}


# Not in transformers 5.17, or not on its experts interface.
NEWER = {"aria", "beam", "glm5_next", "inkling2", "kolibri1", "muse_spark", "step3p7"}


def family(name, implementation="grouped_mm", dtype=torch.float32):
    """Two layers of another family, its experts beside whatever else it has."""
    if name in NEWER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"{name} needs transformers 5.23")
    if name == "step3p7":
        # Its class has no other implementation.
        implementation = "eager"
    model_class = getattr(transformers, FAMILIES[name][0])
    config = model_class.config_class(**{**COMMON, "num_hidden_layers": 2, **FAMILIES[name][1]})
    return finish(model_class, config, implementation, dtype)


def gemma4_multimodal(implementation="grouped_mm", dtype=torch.float32):
    """The wrapper of text and vision around the experts of `gemma4`."""
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=64,
    )
    tokens = {"image_token_id": 120, "video_token_id": 121, "audio_token_id": 122}
    tokens |= {"boi_token_id": 123, "eoi_token_id": 124}
    tokens |= {"boa_token_id": 125, "eoa_token_index": 126}
    text = gemma4("eager").config
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    return finish(Gemma4ForConditionalGeneration, config, implementation, dtype)


def generate(model, prompt, **options):
    """Six greedy tokens after the prompt, with a static cache."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        cache_implementation="static",
        **options,
    )


def enlarge_experts(model):
    """Give stacked experts weights of unit gain, so that they show in the logits; returns it.

    Biases are of size 0.3.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        own = module._parameters
        if hasattr(module, "is_transposed") or {"gate_up_proj", "down_proj"} <= set(own):
            transposed = getattr(module, "is_transposed", False)
            for weight in (p for p in module.parameters() if p.ndim == 3):
                fan_in = weight.shape[1 if transposed else 2]
                values = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
                weight.data.copy_(values)
            for name, bias in own.items():
                if name.endswith("_bias"):
                    bias.data.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    return model


def fingerprint(model):
    """What must not change: every module object, and every tensor's object, place and values."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return modules, [(name, id(tensor), *_content(tensor)) for name, tensor in tensors]


def _content(tensor):
    if isinstance(tensor, torch.nn.UninitializedParameter) or tensor.device.type == "meta":
        return (tensor.dtype,)
    plain = tensor.detach().as_subclass(torch.Tensor)
    if not plain.untyped_storage().nbytes():
        return plain.dtype, plain.shape
    values = plain.clone().flatten().view(torch.uint8).numpy().tobytes()
    return plain.dtype, plain.shape, plain.data_ptr(), tensor._version, values


def enlarge_latent_experts(model):
    """As `enlarge_experts`, and NemotronH's latent projections too; returns the model."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in enlarge_experts(model).named_parameters():
        if name.endswith("latent_proj.weight"):
            values = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
            weight.data.copy_(values)
    return model


def keep_layers(model, *indices):
    """Drop all other decoder layers, in place; returns the model."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in indices)
    model.config.num_hidden_layers = len(indices)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in indices]
    return model


class CapturingBackend:
    """A torch.compile backend that keeps each graph and its inputs and runs it as it is."""

    def __init__(self):
        self.graphs = []
        self.inputs = []
        self.keywords = []

    def __call__(self, graph_module, example_inputs, **keywords):
        self.graphs.append(graph_module)
        self.inputs.append(list(example_inputs))
        self.keywords.append(keywords)
        return graph_module.forward

    def __deepcopy__(self, memo):
        # generate() copies its configuration, options of the backend included.
        return self


def table_entries(weight):
    """What is packed of a float weight, in every form."""
    place = weight.untyped_storage()._cdata
    return [e for e in identity._table.values() if any(m.place == place for m in e.marks)]


def packed_addresses(backend, number):
    """Where the operators of a captured graph find their packed weights."""
    graph, inputs = backend.graphs[number], backend.inputs[number]
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    return {
        name: value.data_ptr()
        for name, value in zip(names, inputs, strict=True)
        if name.startswith("fp4moe_")
    }


def experts_class(
    has_gate=True, is_transposed=False, has_bias=False, act_fn=torch.nn.SiLU, **stamps
):
    """A class of 8 experts of 64 x 48 as transformers' decorator stamps it."""

    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 8
            rows = 96 if has_gate else 48
            first, down = torch.randn(8, rows, 64) / 8, torch.randn(8, 64, 48) / 7
            if is_transposed:
                first, down = first.mT.contiguous(), down.mT.contiguous()
            name = "gate_up_proj" if has_gate else "up_proj"
            self.register_parameter(name, torch.nn.Parameter(first))
            self.down_proj = torch.nn.Parameter(down)
            if has_bias:
                self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.randn(8, rows)))
                self.down_proj_bias = torch.nn.Parameter(torch.randn(8, 64))
            self.act_fn = act_fn()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for token, slot in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)).tolist():
                expert = top_k_index[token, slot]
                x = hidden_states[token]
                first = self.gate_up_proj if has_gate else self.up_proj
                matrices = [weight[expert] for weight in (first, self.down_proj)]
                first, down = (m.T if is_transposed else m for m in matrices)
                y = first @ x
                if has_bias:
                    y = y + (self.gate_up_proj_bias if has_gate else self.up_proj_bias)[expert]
                y = self._apply_gate(y) if has_gate else self.act_fn(y)
                y = down @ y + (self.down_proj_bias[expert] if has_bias else 0)
                out[token] += y * top_k_weights[token, slot]
            return out

    stamps |= {"has_gate": has_gate, "is_transposed": is_transposed, "has_bias": has_bias}
    return use_experts_implementation(**stamps)(Experts)


class Block(torch.nn.Module):
    """One experts module below a module, frozen; call it with what `routed` returns."""

    def __init__(self, experts, implementation="grouped_mm"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.experts = experts(SimpleNamespace(_experts_implementation=implementation))
        self.requires_grad_(False)

    def forward(self, hidden, expert_ids, routing_weights):
        return self.experts(hidden, expert_ids, routing_weights)


def routed(tokens, hidden_size=64, top_k=2, experts=8):
    """Hidden states, distinct expert ids and routing weights of some tokens."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    return hidden, ids, torch.rand(tokens, top_k, generator=generator)


def mixed_gates():
    """Four experts modules of 1 to 4 experts, each with another activation."""
    layers = torch.nn.ModuleList()
    for count, name in enumerate(("silu", "gelu_pytorch_tanh", "gelu", "relu"), start=1):
        config = transformers.MixtralConfig(
            hidden_size=32, intermediate_size=48, num_local_experts=count, hidden_act=name
        )
        config._experts_implementation = "eager"
        layers.append(MixtralExperts(config))
    return enlarge_experts(layers)
