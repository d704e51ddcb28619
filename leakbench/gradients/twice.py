"""Operations that torch differentiates once, written with operations that it differentiates twice.

They act on every example separately, so they serve all paths. Attention is written with the public functions of
``torch.nn.functional``, so that an interception of linear maps and dropout reaches inside it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """Return min(max(x + 3, 0), 6) / 6 (Howard et al. 2019, Searching for MobileNetV3, section 5.2)."""
    out = F.relu6(x + 3) / 6
    return x.copy_(out) if inplace else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return softmax(query key^T scale + mask) value for [..., L, E], [..., S, E] and [..., S, V].

    Vaswani et al. 2017, Attention Is All You Need, equation 1.
    """
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return F.dropout(_attention(query, key, attn_mask, scale), dropout_p) @ value


def _attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return the weights [..., L, S]; a mask is added, or False where attention is not allowed."""
    scores = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the results of ``torch.nn.MultiheadAttention``: an output [L, B, E], and weights [B, L, S] (or None).

    Raises:
        NotImplementedError: the keys and values have biases, zeros or weights of their own, or there is no batch axis.
    """
    if in_weight is None or bias_k is not None or static_k is not None or add_zero_attn or query.ndim != 3:
        raise NotImplementedError(
            "multi-head attention with bias_k, add_zero_attn, kdim, vdim or without a batch axis; "
            "write it with linear layers and scaled_dot_product_attention"
        )
    rows = [x.transpose(0, 1) for x in (query, key, value)]
    if query is key and key is value:
        parts = F.linear(rows[0], in_weight, in_bias).chunk(3, -1)
    else:
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3, -1)
        parts = tuple(F.linear(*one) for one in zip(rows, in_weight.chunk(3, -2), biases))
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    mask = None if attn_mask is None else _added(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q)[:, None, None]
        mask = padding if mask is None else mask + padding
    weights = F.dropout(_attention(q, k, mask), dropout_p, training)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask of which True forbids, as it is added to the scores."""
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


ELEMENTARY: Mapping[Callable[..., Any], Callable[..., Any]] = {F.hardsigmoid: hardsigmoid}
COMPOSITE: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
}
"""These call functions that are themselves intercepted."""
