"""Routing methods, named by their maths, as plain torch functions.

A method takes router logits [T, E] of any float dtype and returns `(expert_ids, routing_weights)`:
int64 [T, K] and float32 [T, K], in order of falling selection score. It computes in float32 on the
device of the logits, without host sync, and writes to no argument. T = 0 is legal. Among equal
scores torch.topk chooses, and its choice may differ between devices.

Who routes how (transformers 5.23.0, `models/<model>/modeling_<model>.py`):

    softmax_topk                    Qwen2-MoE, Qwen3-MoE, OLMoE; DeepSeek-V2 "greedy"
    softmax_topk, renormalize=True  the same with norm_topk_prob (not DeepSeek-V2); Mixtral, MiniMax
    ... and per_expert_scale        Gemma4
    grouped_softmax_topk            DeepSeek-V2 "group_limited_greedy"; Mistral4
    topk_softmax                    gpt-oss
    sigmoid_topk                    DeepSeek-V3, NemotronH, GLM4-MoE, MiniMax-M2, AXK2
    topk_sigmoid                    Llama4

Not handled here: the router's projection and norms, a model's own cast of the weights to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from .errors import must
from .layer import Routing

__all__ = ["ROUTING_METHODS", "RoutingMethod", "grouped_softmax_topk", "sigmoid_topk"]
__all__ += ["ROUNDINGS", "route", "route_gradients", "softmax_topk", "topk_sigmoid"]
__all__ += ["topk_softmax"]

# Softmax or sigmoid (2 ulp), the bias, a sum, a quotient and two factors stay below 16 roundings.
ROUNDINGS = 16 * torch.finfo(torch.float32).eps

# Keeps the sum of k sigmoids that are 0 from becoming a divisor of 0, as the models do.
EPSILON = 1e-20

RoutingMethod = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = False,
    scaling: float = 1.0,
    per_expert_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the top k probabilities.

    p = softmax(logits);  S = the k largest p;  w[e] = p[e] * scaling * per_expert_scale[e] for e in
    S, where renormalize=True first divides p[e] by the sum of p over S.

    Args:
        logits: [T, E], any float dtype.
        top_k: experts per token, 1 to E.
        renormalize: divide the k probabilities by their sum (`norm_topk_prob`).
        scaling: factor of every weight (`routed_scaling_factor`).
        per_expert_scale: [E] factor of each expert's weight, after the division (Gemma4).

    Returns expert_ids int64 [T, K] and routing_weights float32 [T, K], largest p first.
    Raises ShapeError if logits is not a 2-D float tensor, or another argument does not fit it.
    Source: Qwen3MoeTopKRouter, MixtralTopKRouter, Gemma4TextRouter, transformers 5.23.0.
    """
    _check_logits("softmax_topk", logits, top_k)
    _check_per_expert("softmax_topk", "per_expert_scale", per_expert_scale, logits)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, expert_ids = torch.topk(probabilities, top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights * scaling
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.float()[expert_ids]
    return expert_ids, weights


def grouped_softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    num_groups: int,
    top_groups: int,
    group_score_experts: int = 1,
    renormalize: bool = False,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the top k probabilities within the best groups of experts.

    p = softmax(logits); E / num_groups neighbours form a group, which scores the sum of its
    group_score_experts largest p; the top_groups best groups stay; S = the k largest p in them;
    w[e] = p[e] * scaling for e in S, where renormalize=True first divides p[e] by the sum over S.
    A dropped group's expert is never selected (transformers fills with 0.0, so there it can tie
    with a kept expert whose p underflows to 0).

    Args:
        logits: [T, E], any float dtype.
        top_k: experts per token, at most the experts of the kept groups.
        num_groups: groups of equal size (`n_group`).
        top_groups: groups that stay (`topk_group`).
        group_score_experts: 1, a group's maximum, for DeepSeek-V2; 2 for Mistral4.
        renormalize: divide the k probabilities by their sum (Mistral4's `norm_topk_prob`).
        scaling: factor of every weight (`routed_scaling_factor`).

    Returns expert_ids int64 [T, K] and routing_weights float32 [T, K], largest p first.
    Raises ShapeError if logits is not a 2-D float tensor, or another argument does not fit it.
    Source: DeepseekV2TopkRouter, Mistral4TopkRouter, transformers 5.23.0.
    """
    function = "grouped_softmax_topk"
    _check_logits(function, logits, top_k)
    if group_score_experts < 1:
        advice = "Pass 1 to score a group by its maximum."
        must(f"{function}: group_score_experts", "be at least 1", group_score_experts, advice)
    _check_groups(function, logits, top_k, num_groups, top_groups, group_score_experts)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    choice = _mask_groups(probabilities, num_groups, top_groups, group_score_experts, -math.inf)
    expert_ids = torch.topk(choice, top_k, dim=-1).indices
    weights = probabilities.gather(1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return expert_ids, weights * scaling


def topk_softmax(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k logits, then softmax over the k.

    S = the k largest logits;  w[e] = exp(logits[e]) / sum over S of exp(logits), for e in S.

    Equals `softmax_topk(logits, top_k, renormalize=True)`, as the sum over all E cancels: up to
    rounding of the weights, and up to ids whose probabilities round to a tie.

    Args: logits [T, E], any float dtype; top_k, experts per token, 1 to E.
    Returns expert_ids int64 [T, K] and routing_weights float32 [T, K], largest logit first.
    Raises ShapeError if logits is not a 2-D float tensor, or top_k does not fit it.
    Source: GptOssTopKRouter (which takes softmax in the logits' dtype), transformers 5.23.0.
    """
    _check_logits("topk_softmax", logits, top_k)
    values, expert_ids = torch.topk(logits.float(), top_k, dim=-1)
    return expert_ids, torch.softmax(values, dim=-1)


def sigmoid_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
    epsilon: float = EPSILON,
    masked_score: float = -math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid of every logit, then the top k; a bias steers the selection, not the weights.

    s = sigmoid(logits);  c = s + bias; E / num_groups neighbours form a group, which scores the sum
    of its two largest c; c becomes masked_score outside the top_groups best groups;  S = the k
    largest c;  w[e] = s[e] * scaling for e in S, where renormalize=True first divides s[e] by
    (the sum of s over S) + epsilon.

    Args:
        logits: [T, E], any float dtype.
        top_k: experts per token, at most the experts of the kept groups.
        bias: [E], added for the selection only (`e_score_correction_bias`); None is zero.
        num_groups: groups of equal size, two experts or more (`n_group`); 1 means no groups.
        top_groups: groups that stay (`topk_group`).
        renormalize: divide the k sigmoids by their sum (`norm_topk_prob`).
        scaling: factor of every weight (`routed_scaling_factor`).
        epsilon: keeps k sigmoids of 0 from becoming NaN. MiniMax-M2 has none: 0.0.
        masked_score: -inf (DeepSeek-V3, NemotronH, GLM4-MoE) never selects from a dropped group;
            0.0 (AXK2) does where a kept expert's c is negative.

    Returns expert_ids int64 [T, K] and routing_weights float32 [T, K], largest c first.
    Raises ShapeError if logits is not a 2-D float tensor, or another argument does not fit it.
    Source: DeepseekV3-, NemotronH-, AXK2TopkRouter, MiniMaxM2TopKRouter, transformers 5.23.0.
    """
    _check_logits("sigmoid_topk", logits, top_k)
    _check_groups("sigmoid_topk", logits, top_k, num_groups, top_groups, 2)
    _check_per_expert("sigmoid_topk", "bias", bias, logits)
    scores = torch.sigmoid(logits.float())
    choice = scores if bias is None else scores + bias.float()
    choice = _mask_groups(choice, num_groups, top_groups, 2, masked_score)
    expert_ids = torch.topk(choice, top_k, dim=-1).indices
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + epsilon)
    return expert_ids, weights * scaling


def topk_sigmoid(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k logits, then the sigmoid of each; the weights need not sum to 1.

    S = the k largest logits;  w[e] = sigmoid(logits[e]) for e in S. Llama4 multiplies an expert's
    *input* by w, not its output: through a non-linear expert these differ.

    Args: logits [T, E], any float dtype; top_k, experts per token, 1 to E.
    Returns expert_ids int64 [T, K] and routing_weights float32 [T, K], largest logit first.
    Raises ShapeError if logits is not a 2-D float tensor, or top_k does not fit it.
    Source: Llama4Router, transformers 5.23.0.
    """
    _check_logits("topk_sigmoid", logits, top_k)
    values, expert_ids = torch.topk(logits.float(), top_k, dim=-1)
    return expert_ids, torch.sigmoid(values)


_METHODS = (softmax_topk, grouped_softmax_topk, topk_softmax, sigmoid_topk, topk_sigmoid)
# Keyed by name, so that a kernel that routes inside can map a name to its library's enum.
ROUTING_METHODS: Mapping[str, RoutingMethod] = MappingProxyType({f.__name__: f for f in _METHODS})


def _mask_groups(
    scores: torch.Tensor, num_groups: int, top_groups: int, score_experts: int, fill: float
) -> torch.Tensor:
    if top_groups == num_groups:
        return scores
    grouped = scores.reshape(scores.shape[0], num_groups, scores.shape[1] // num_groups)
    group_scores = grouped.topk(score_experts, dim=-1).values.sum(dim=-1)
    kept = torch.topk(group_scores, top_groups, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), fill).reshape(scores.shape)


def route(
    router_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    routing: Routing,
    output_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert_ids, routing_weights) as a `Routing` says.

    routing_bias, and the factor of each expert's weight output_scale, are [E], or [0] for none.
    """
    if routing.method == "softmax_topk":
        ids, weights = softmax_topk(
            router_logits, routing.top_k, renormalize=True, scaling=routing.scaling
        )
    else:
        ids, weights = sigmoid_topk(
            router_logits,
            routing.top_k,
            bias=routing_bias if routing_bias.numel() else None,
            num_groups=routing.num_groups,
            top_groups=routing.top_groups,
            scaling=routing.scaling,
        )
    if output_scale is not None and output_scale.numel():
        weights = weights * output_scale.float()[ids]
    return ids, weights


def route_gradients(
    gradient: torch.Tensor,
    router_logits: torch.Tensor,
    output_scale: torch.Tensor,
    expert_ids: torch.Tensor,
    routing: Routing,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `route`'s weights [T, K] hand back to (router_logits, output_scale).

    The choice itself has no derivative: an expert that was not chosen, and the bias, get none.
    """
    chosen = router_logits.float().gather(1, expert_ids)
    if routing.method == "softmax_topk":
        share = torch.softmax(chosen, dim=-1)
        slope = share
    else:
        scores = torch.sigmoid(chosen)
        share = scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)
        slope = share * (1 - scores)
    gradient = gradient.float() * routing.scaling
    to_scale = torch.zeros_like(output_scale)
    if output_scale.numel():
        flat = (gradient * share).flatten().to(to_scale.dtype)
        to_scale = to_scale.index_add(0, expert_ids.flatten(), flat)
        gradient = gradient * output_scale.float()[expert_ids]
    to_chosen = slope * (gradient - (gradient * share).sum(dim=-1, keepdim=True))
    to_logits = torch.zeros_like(router_logits)
    return to_logits.scatter(1, expert_ids, to_chosen.to(to_logits.dtype)), to_scale


def _check_logits(function: str, logits: torch.Tensor, top_k: int) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        got = f"shape {tuple(logits.shape)}, {logits.dtype}"
        advice = "Flatten the router's output to [T, E]."
        must(f"{function}: logits", "be a 2-D float tensor [T, E]", got, advice)
    if not 1 <= top_k <= logits.shape[1]:
        rule = f"lie in 1..{logits.shape[1]}, the experts"
        must(f"{function}: top_k", rule, top_k, "Pass the model's experts per token.")


def _check_per_expert(
    function: str, argument: str, value: torch.Tensor | None, logits: torch.Tensor
) -> None:
    if value is not None and (value.ndim != 1 or value.shape[0] != logits.shape[1]):
        rule = f"have shape ({logits.shape[1]},)"
        got = tuple(value.shape)
        must(f"{function}: {argument}", rule, got, "Pass one value for each expert.")


def _check_groups(
    function: str, logits: torch.Tensor, top_k: int, num_groups: int, top_groups: int, smallest: int
) -> None:
    experts = logits.shape[1]
    size = experts // num_groups if num_groups > 0 else 0
    if size * num_groups != experts or (num_groups > 1 and size < smallest):
        rule = f"divide {experts} experts into groups of {smallest} or more"
        must(f"{function}: num_groups", rule, num_groups, "Pass the model's n_group.")
    if not 1 <= top_groups <= num_groups:
        rule = f"lie in 1..{num_groups}, the groups"
        must(f"{function}: top_groups", rule, top_groups, "Pass the model's topk_group.")
    if top_k > top_groups * size:
        rule = f"be at most {top_groups * size}, the experts kept"
        must(f"{function}: top_k", rule, top_k, "Keep more groups.")
