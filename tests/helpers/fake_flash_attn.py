"""The two functions of flash-attn 2 that we call, by its documentation, in plain torch.

A causal mask is aligned with the last key; rows that see nothing are zeros; `return_attn_probs`
adds the logsumexp, `[b, h, s]`, and the dropout mask. `calls` counts kernel calls by name.
"""

from collections import Counter

import torch

__version__ = "2.8.3"
calls: Counter = Counter()


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    calls["deterministic" if deterministic else "flash_attn_func"] += 1
    output, lse = _attend(q, k, v, dropout_p, softmax_scale, causal)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    calls["flash_attn_varlen_func"] += 1
    assert q.dim() == k.dim() == v.dim() == 3
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(counts) for counts in lengths] == [max_seqlen_q, max_seqlen_k]
    documents = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat(
        [
            _attend(*(x[None] for x in document), dropout_p, softmax_scale, causal)[0][0]
            for document in documents
        ]
    )


def _attend(q, k, v, dropout_p, softmax_scale, causal):
    assert q.shape[2] % k.shape[2] == 0 and q.shape[3] == k.shape[3] == v.shape[3]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if causal:
        visible = torch.ones(scores.shape[-2:]).tril(k.shape[1] - q.shape[1]).bool()
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    weights = torch.dropout(weights, dropout_p, train=True)
    output = torch.einsum("bhst,bthd->bshd", weights, v).contiguous()
    return output, torch.logsumexp(scores, dim=-1)
