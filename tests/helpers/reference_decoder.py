"""A decoder-only transformer in plain fp64 torch, with LongRoPE written out from the paper.

It shares no formula with the plugin and no code with Megatron. Weights are a dictionary under the
names of megatron-core's local layer specs; what they do not hold (biases, norms of queries and
keys) is left out of the computation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rope:
    """Rotation of queries and keys: by n / (lambda_i beta_i), beta_i = base^(2 i / rotary_dim)."""

    factors: tuple[float, ...]
    """lambda_i, one for each rotated pair."""

    attention_factor: float = 1.0
    """Multiplier of what is rotated, in queries and in keys."""

    num_start_tokens: int = 0
    """Positions that keep lambda_i = 1."""

    base: float = 10000.0
    interleaved: bool = False

    def angles(self, length: int) -> Tensor:
        """`[length, rotary_dim / 2]`, fp64."""
        pairs = len(self.factors)
        rows = [
            [
                n / ((lam if n >= self.num_start_tokens else 1.0) * self.base ** (i / pairs))
                for i, lam in enumerate(self.factors)
            ]
            for n in range(length)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `[s, h, d]` at positions 0, 1, ...; each pair is one complex number."""
        size = 2 * len(self.factors)
        turned, rest = x[..., :size], x[..., size:]
        if self.interleaved:
            pairs = torch.complex(turned[..., 0::2], turned[..., 1::2])
        else:
            pairs = torch.complex(*turned.chunk(2, dim=-1))
        angles = self.angles(len(x))[:, None]
        pairs = pairs * torch.polar(torch.full_like(angles, self.attention_factor), angles)
        if self.interleaved:
            turned = torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)
        else:
            turned = torch.cat((pairs.real, pairs.imag), dim=-1)
        return torch.cat((turned, rest), dim=-1)


@dataclass(frozen=True)
class Decoder:
    """The model; `heads` query heads share `groups` key and value heads."""

    rope: Rope
    heads: int
    groups: int

    unrotated_layers: tuple[int, ...] = ()
    """Layers without RoPE, counted from 0."""

    def logits(self, weights: Weights, tokens: Tensor) -> Tensor:
        """`[b, s] -> [b, s, v]`."""
        return torch.stack([self._output(weights, self.hidden(weights, row)) for row in tokens])

    def losses(self, weights: Weights, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token, `[b, s]`."""
        logits = self.logits(weights, tokens)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(
            labels
        )

    def packed_losses(
        self, weights: Weights, tokens: Tensor, labels: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Losses `[1, t]` of documents that lie back to back and do not see one another."""
        documents = zip(tokens.split(lengths, 1), labels.split(lengths, 1), strict=True)
        return torch.cat([self.losses(weights, *document) for document in documents], dim=1)

    def hidden(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Before the final norm: `[s] -> [s, hidden]`."""
        x = weights["embedding.word_embeddings.weight"][tokens]
        number = 0
        while f"decoder.layers.{number}.mlp.linear_fc1.weight" in weights:
            rope = None if number in self.unrotated_layers else self.rope
            x = self._layer(weights, f"decoder.layers.{number}.", x, rope)
            number += 1
        return x

    def multi_token_hidden(self, weights: Weights, tokens: Tensor) -> Tensor:
        """What the first multi-token prediction layer computes: `[s] -> [s, hidden]`.

        It sees the decoder's output and the embedding of the next token; behind the last token
        Megatron puts token 0.
        """
        prefix = "mtp.layers.0."
        following = torch.cat((tokens[1:], tokens.new_zeros(1)))
        embedded = weights["embedding.word_embeddings.weight"][following]
        x = self.hidden(weights, tokens)
        x = _norm(weights, "decoder.final_layernorm", x)
        x = torch.cat(
            (_norm(weights, f"{prefix}enorm", embedded), _norm(weights, f"{prefix}hnorm", x)),
            dim=-1,
        )
        x = _linear(weights, f"{prefix}eh_proj", x)
        x = self._layer(weights, f"{prefix}mtp_model_layer.", x, self.rope)
        return _norm(weights, f"{prefix}final_layernorm", x)

    def _output(self, weights: Weights, x: Tensor) -> Tensor:
        return _norm(weights, "decoder.final_layernorm", x) @ weights["output_layer.weight"].T

    def _layer(self, weights: Weights, prefix: str, x: Tensor, rope: Rope | None) -> Tensor:
        normed = _norm(weights, f"{prefix}input_layernorm", x)
        x = x + self._attention(weights, prefix, normed, rope)
        return x + self._mlp(weights, prefix, _norm(weights, f"{prefix}pre_mlp_layernorm", x))

    def _attention(self, weights: Weights, prefix: str, x: Tensor, rope: Rope | None) -> Tensor:
        prefix += "self_attention."
        mixed = _linear(weights, f"{prefix}linear_qkv", x)
        shared = self.heads // self.groups
        # Group by group: its queries, its key, its value.
        mixed = mixed.view(len(x), self.groups, shared + 2, -1)
        query = mixed[:, :, :-2].flatten(1, 2)
        key, value = mixed[:, :, -2], mixed[:, :, -1]
        if f"{prefix}q_layernorm.weight" in weights:
            query = _norm(weights, f"{prefix}q_layernorm", query)
            key = _norm(weights, f"{prefix}k_layernorm", key)
        if rope is not None:
            query, key = rope(query), rope(key)
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        shares = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        output = torch.einsum("hqk,khd->qhd", shares, value).flatten(1)
        return _linear(weights, f"{prefix}linear_proj", output)

    def _mlp(self, weights: Weights, prefix: str, x: Tensor) -> Tensor:
        gate, up = _linear(weights, f"{prefix}mlp.linear_fc1", x).chunk(2, dim=-1)
        return _linear(weights, f"{prefix}mlp.linear_fc2", F.silu(gate) * up)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = x @ weights[f"{name}.weight"].T
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Root mean square norm, or layer norm when there is a bias."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
