"""Blocks that loop over a list of expert modules, as models did before transformers 5."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn

H, INNER, E, K = 48, 32, 6, 2


class SquaredRelu(nn.Module):
    def forward(self, x):
        return F.relu(x) ** 2


class Gated(nn.Module):
    """gate_proj, up_proj, down_proj: Qwen, OLMoE and DeepSeek style."""

    def __init__(self, hidden=H, intermediate=INNER, bias=False, act=None):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Numbered(nn.Module):
    """Mixtral style: w1 is gate, w3 is up, w2 is down."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(H, INNER, bias=False)
        self.w2 = nn.Linear(INNER, H, bias=False)
        self.w3 = nn.Linear(H, INNER, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Ungated(nn.Module):
    """NemotronH style."""

    def __init__(self, hidden=H, intermediate=INNER):
        super().__init__()
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = SquaredRelu()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


def loop(experts, tokens, ids, weights):
    """Add each expert's share to the tokens that chose it."""
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(experts):
        token, slot = torch.where(ids == index)
        share = expert(tokens[token]) * weights[token, slot, None]
        out.index_add_(0, token, share.to(out.dtype))
    return out


class MixtralOld(nn.Module):
    """Router Linear, float32 softmax, top k, renormalised; returns the logits too."""

    def __init__(self):
        super().__init__()
        self.top_k = K
        self.jitter_noise = 0.1
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Numbered() for _ in range(E))

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
        tokens = hidden_states.view(-1, width)
        logits = self.gate(tokens)
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)
        return loop(self.experts, tokens, ids, weights).reshape(batch, length, width), logits


class OlmoeOld(nn.Module):
    """As Mixtral, without the renormalisation, which is an option."""

    def __init__(self, norm_topk_prob=False):
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = E, K, norm_topk_prob
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def mix(self, tokens):
        logits = self.gate(tokens)
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return loop(self.experts, tokens, ids, weights.to(tokens.dtype)), logits

    def forward(self, hidden_states):
        out, logits = self.mix(hidden_states.view(-1, hidden_states.shape[-1]))
        return out.reshape(hidden_states.shape), logits


class Qwen2Old(OlmoeOld):
    """A shared expert, weighed by a sigmoid, beside the routed ones."""

    def __init__(self):
        super().__init__()
        self.shared_expert = Gated(H, 2 * INNER)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        out, logits = self.mix(tokens)
        out = out + F.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return out.reshape(hidden_states.shape), logits


class GroupedRouter(nn.Module):
    """Sigmoid scores with a selection bias, within the best groups; returns ids and weights."""

    def __init__(self, config, weights_first=False):
        super().__init__()
        self.config, self.weights_first = config, weights_first
        self.weight = nn.Parameter(torch.randn(E, H) / H**0.5)
        self.register_buffer("e_score_correction_bias", torch.rand(E))

    def forward(self, hidden_states):
        tokens = hidden_states.view(-1, H)
        scores = F.linear(tokens.float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias
        grouped = choice.view(-1, self.config.n_group, E // self.config.n_group)
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.config.topk_group, dim=-1)[1]
        mask = torch.zeros(grouped.shape[:2]).scatter_(1, best, 1.0).bool()
        choice = grouped.masked_fill(~mask.unsqueeze(-1), 0.0).view(-1, E)
        ids = choice.topk(K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        return (weights, ids) if self.weights_first else (ids, weights)


DEEPSEEK = types.SimpleNamespace(n_group=3, topk_group=2, routed_scaling_factor=2.5)


class DeepseekOld(nn.Module):
    """A router of its own, a `moe` method, and shared experts on the residual."""

    def __init__(self, weights_first=False):
        super().__init__()
        self.config = DEEPSEEK
        self.experts = nn.ModuleList(Gated() for _ in range(E))
        self.gate = GroupedRouter(DEEPSEEK, weights_first)
        self.shared_experts = Gated(H, 2 * INNER)

    def moe(self, hidden_states, topk_indices, topk_weights):
        out = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
        mask = F.one_hot(topk_indices, num_classes=len(self.experts)).permute(2, 0, 1)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(mask[index])
            if token.numel() > 0:
                share = expert(hidden_states[token]) * topk_weights[token, slot].unsqueeze(-1)
                out.index_add_(0, token, share)
        return out.type(hidden_states.dtype)

    def forward(self, hidden_states):
        residual, shape = hidden_states, hidden_states.shape
        first, second = self.gate(hidden_states)
        ids, weights = (first, second) if second.is_floating_point() else (second, first)
        out = self.moe(hidden_states.view(-1, shape[-1]), ids, weights).view(*shape)
        return out + self.shared_experts(residual)


class WeightsFirst(DeepseekOld):
    def __init__(self):
        super().__init__(weights_first=True)


class SortedInference(DeepseekOld):
    """The remote code's other loop: tokens sorted by expert, evaluation only."""

    def moe(self, hidden_states, topk_indices, topk_weights):
        if self.training:
            raise NotImplementedError("evaluation only")
        counts = topk_indices.new_zeros((topk_indices.shape[0], len(self.experts)))
        counts = counts.scatter_(1, topk_indices, 1).sum(0).cpu().numpy()
        order = topk_indices.view(-1).argsort()
        chosen = hidden_states[order // topk_indices.shape[1]]
        outputs, start = [], 0
        for index, count in enumerate(counts):
            if count:
                outputs.append(self.experts[index](chosen[start : start + count]))
                start += count
        stacked = torch.empty_like(torch.cat(outputs))
        stacked[order] = torch.cat(outputs)
        shares = stacked.view(*topk_indices.shape, -1) * topk_weights.unsqueeze(-1)
        return shares.sum(1).type(hidden_states.dtype)


class NemotronRemote(DeepseekOld):
    """Experts without a gate; idle ones run on zeros."""

    width = H

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Ungated(self.width) for _ in range(E))
        self.shared_experts = Ungated(H, 2 * INNER)

    def moe(self, hidden_states, topk_indices, topk_weights):
        out = torch.zeros_like(hidden_states, dtype=topk_weights.dtype)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(topk_indices == index)
            if token.numel() > 0:
                share = expert(hidden_states[token]) * topk_weights[token, slot].unsqueeze(-1)
                out.index_add_(0, token, share)
            else:
                zeros = torch.zeros_like(hidden_states[:1]).to(expert.down_proj.weight.dtype)
                out = out + expert(zeros)
        return out.type(hidden_states.dtype)


class NemotronLatent(NemotronRemote):
    """The routed experts work on a narrower hidden state."""

    width = 32

    def __init__(self):
        super().__init__()
        self.fc1_latent_proj = nn.Linear(H, self.width, bias=False)
        self.fc2_latent_proj = nn.Linear(self.width, H, bias=False)

    def forward(self, hidden_states):
        ids, weights = self.gate(hidden_states)
        latent = self.fc1_latent_proj(hidden_states.view(-1, H))
        out = self.fc2_latent_proj(self.moe(latent, ids, weights)).view(hidden_states.shape)
        return out + self.shared_experts(hidden_states)


class Plain(nn.Module):
    """A user's block: top k, then softmax; inline activation; one tensor in, one out."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.mlps = nn.ModuleList(Gated() for _ in range(E))

    def route(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return ids, values.softmax(-1)

    def finish(self, out):
        return out

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        ids, weights = self.route(self.router(tokens))
        return self.finish(loop(self.mlps, tokens, ids, weights.to(x.dtype))).reshape(x.shape)


class PlainSigmoid(Plain):
    """Sigmoid scores, selected with a bias, scaled; the router reads float32."""

    def __init__(self):
        super().__init__()
        self.selection_bias = nn.Parameter(torch.rand(E))
        self.output_scaling = 1.7

    def route(self, logits):
        scores = logits.sigmoid()
        ids = (scores + self.selection_bias).topk(K, dim=-1)[1]
        weights = scores.gather(1, ids)
        return ids, self.output_scaling * weights / weights.sum(-1, keepdim=True)


class ClampedExpert(nn.Module):
    """Biases everywhere, and the clamped gate of gpt-oss: an expert of our own."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(H, INNER)
        self.up_proj = nn.Linear(H, INNER)
        self.down_proj = nn.Linear(INNER, H)

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=1.5)
        up = self.up_proj(x).clamp(-1.5, 1.5)
        return self.down_proj((up + 1) * gate * torch.sigmoid(1.702 * gate))


class OpenAiOld(Plain):
    """gpt-oss as a loop: top k, then softmax; biases, clamps and a shift in every expert."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(ClampedExpert() for _ in range(E))
        for parameter in self.mlps.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)


class UpBiasAlone(Plain):
    """Only up has a bias, and not in every expert."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(Gated(bias=index != 2) for index in range(E))
        for parameter in self.mlps.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)


STYLES = [MixtralOld, OlmoeOld, Qwen2Old, DeepseekOld, WeightsFirst, SortedInference]


class Model(nn.Module):
    """The block twice, each behind a norm."""

    def __init__(self, make):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            out = block(norm(x))
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def make_model(make, dtype=torch.float32):
    """A model for evaluation with weights of a useful size."""
    model = Model(make).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.to(dtype)


def weights_first(self, x):
    """Weigh the input of an expert, not its output, as Llama 4 does."""
    tokens = x.reshape(-1, H)
    ids, weights = self.route(self.router(tokens))
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(self.mlps):
        token, slot = torch.where(ids == index)
        out.index_add_(0, token, expert(tokens[token] * weights[token, slot, None]))
    return out.reshape(x.shape)
