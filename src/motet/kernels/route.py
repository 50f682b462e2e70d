"""Which experts a token goes to, and with which weights.

Semantics, for a token's router logits g [E]:
    s = softmax(g) or sigmoid(g);  c = s + bias (what experts are chosen by; the bias has no part in the weights)
    with groups: the E experts form `groups` equal runs, scored by their best c ("max") or the sum of their best two
    ("top2"); only experts of the best `top_groups` runs stay
    e_1 … e_k = the k experts of largest c;  w_i = s[e_i], with `normalise` s[e_i] / sum_j s[e_j];  w_i *= scale
    logits: [T, E] float32; weights [T, k] float32, experts [T, k] int64.

Softmax over the k chosen logits is softmax with `normalise`: the sum over the others cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """How a router's logits choose and weigh experts; see the module's semantics.

    `bias` [E] float32. With `on_input` the weight multiplies what goes into an expert instead of what comes out.
    """

    top_k: int
    normalise: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: Tensor | None = None
    scale: float = 1.0
    on_input: bool = False


def choose_experts(logits: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, k] of each token."""
    scores = torch.softmax(logits, dim=-1) if rule.scoring == "softmax" else torch.sigmoid(logits)
    if rule.bias is None and rule.groups == 1:
        choice = logits  # in the same order as their scores, but above 17 all sigmoids are 1 in float32
    else:
        choice = scores if rule.bias is None else scores + rule.bias
    if rule.groups > 1:
        choice = _only_best_groups(choice, rule)
    experts = choice.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids below e^-88 are all 0
    return (weights if rule.scale == 1 else weights * rule.scale), experts


def _only_best_groups(choice: Tensor, rule: RoutingRule) -> Tensor:
    """Scores with those outside the best groups at minus infinity."""
    grouped = choice.view(len(choice), rule.groups, choice.shape[1] // rule.groups)
    top = grouped.topk(2 if rule.group_score == "top2" else 1, dim=-1).values.sum(-1)
    best = top.topk(rule.top_groups, dim=-1).indices
    kept = torch.zeros_like(top, dtype=torch.bool).scatter_(-1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).view(choice.shape)
