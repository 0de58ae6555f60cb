"""Attention modules, random batches and a plain softmax in fp64 to compare with."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longrope.attention import SdpaCoreAttention

HEADS = 4
HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5


def core_attention(
    cls=SdpaCoreAttention, *, config_options=None, mask_type=AttnMaskType.causal, **options
):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **(config_options or {}),
    )
    return cls(config, 1, mask_type, "self", **options)


def tokens_scale(length: int) -> float:
    """A document scale that tells every length from every other."""
    return 1.0 + 0.1 * length


def with_scale(cls):
    return type("Scaled", (cls,), {"document_scale": staticmethod(tokens_scale)})


@dataclass(frozen=True)
class Pack:
    """Documents of `lengths` tokens in `rows` rows, and rows behind the last."""

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    tail: int = 0

    @classmethod
    def tight(cls, *lengths: int) -> "Pack":
        return cls(lengths, lengths)

    @property
    def total(self) -> int:
        return sum(self.rows) + self.tail

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.rows)][:-1]

    def params(self, **options) -> PackedSeqParams:
        offsets, padded = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
            for counts in (self.lengths, self.rows)
        )
        if self.rows == self.lengths:
            padded = None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max(self.rows),
            max_seqlen_kv=max(self.rows),
            **options,
        )


def random_batch(rows, *, keys=None, groups=HEADS, value_dim=HEAD_DIM, batch=None):
    """Query, key, value `[rows, heads, d]` and the output's gradient `[rows, h * d_v]`, in fp64.

    `batch` adds a dimension behind the rows.
    """
    keys = rows if keys is None else keys
    generator = torch.Generator().manual_seed(rows * 1000 + keys + groups)
    shape = () if batch is None else (batch,)
    return [
        torch.randn(*sizes, generator=generator, dtype=torch.float64)
        for sizes in (
            (rows, *shape, HEADS, HEAD_DIM),
            (keys, *shape, groups, HEAD_DIM),
            (keys, *shape, groups, value_dim),
            (rows, *shape, HEADS * value_dim),
        )
    ]


def reference(query, key, value, scale=SCALE, causal=True):
    """Softmax attention, the last query at the last key: `[s, ..., h, d] -> [s, ..., h * d_v]`."""
    members = query.shape[-2] // key.shape[-2]
    key, value = (x.double().repeat_interleave(members, dim=-2) for x in (key, value))
    scores = torch.einsum("s...hd,t...hd->...hst", query.double(), key) * scale
    if causal:
        rows, columns = scores.shape[-2:]
        place = torch.arange(rows, device=scores.device)[:, None] + columns - rows
        future = torch.arange(columns, device=scores.device) > place
        scores = scores.masked_fill(future, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("...hst,t...hd->s...hd", weights, value).flatten(-2)


def stock_attention(query, key, value, scale=SCALE, causal=True):
    """The same by torch's own attention, in the inputs' type and on their device."""
    # [s, ..., h, d] -> [..., h, s, d], with a batch
    query, key, value = (x.movedim(0, -2) for x in (query, key, value))
    is_pack = query.dim() == 3
    if is_pack:
        query, key, value = (x[None] for x in (query, key, value))
    rows, columns = query.shape[-2], key.shape[-2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask if causal else None, scale=scale, enable_gqa=True
    )
    output = output.movedim(-2, 0).flatten(-2)
    return output[:, 0] if is_pack else output


def relative_errors(values, exact):
    """Norm of each difference over the norm of the exact value."""
    return [
        ((mine.double().cpu() - theirs).norm() / theirs.norm()).item()
        for mine, theirs in zip(values, exact, strict=True)
    ]


def packed_reference(
    query, key, value, pack: Pack, *, scale_of=None, causal=True, attention=reference, plain=SCALE
):
    """Every document alone, zeros in padding rows: `[t, h, d] -> [t, h * d_v]`."""
    pieces = []
    for start, length, rows in zip(pack.starts, pack.lengths, pack.rows, strict=True):
        part = slice(start, start + length)
        scale = plain * (1.0 if scale_of is None else scale_of(rows))
        output = attention(query[part], key[part], value[part], scale, causal)
        pieces += [output, output.new_zeros(rows - length, output.shape[-1])]
    pieces.append(query.new_zeros(pack.tail, query.shape[-2] * value.shape[-1]))
    return torch.cat(pieces)


def output_and_gradients(function, query, key, value, output_gradient):
    """The output, then the gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves)
    output.backward(output_gradient)  # as in training; reentrant checkpoints take no autograd.grad
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(ours, theirs, tolerance=1e-12):
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, expected, rtol=tolerance, atol=tolerance, check_dtype=False
        )
