"""Write a small Llama model whose initial weights can already look a token up.

    python examples/claims/initial_model.py --output initial --tokenizer-model tokenizer.model \
        --num-layers 2 --hidden-size 128 --ffn-hidden-size 768 --num-attention-heads 4

A language model finds a passkey with induction heads (Olsson et al., arXiv 2209.11895): heads of an
early layer carry the tokens before along, and those of a later layer look for the place that equal
tokens precede and repeat what stands there. From random weights a model of a million parameters
did not come upon them within millions of tokens. So the weights start with one such circuit, and
training shapes it from there or drops it; compare mimetic initialization (Trockman and Kolter,
arXiv 2305.09828). All other weights are random, as usual.

RoPE is what makes looking back possible, and rescaling it disturbs these heads as it does those of
large models: the fastest frequencies tell one position back from none and from two.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_longrope.data.tokenizer import load_tokenizer

# Found by trial: attention of 0.99 to that position and of 0.6 to 0.8 to what followed, which
# comes out first.
LOOK_BACK = 40.0  # score of the position that a head looks back to, in logits
MATCH = 3.0  # size of query and key of the matching heads
COPY = 8.0  # size of what they write
FAST = 3  # frequencies that tell a position from its neighbours


def at_distance(vector, distance, frequencies):
    """Turn a head's vector ``[head_dim]`` by a distance in positions, halves paired as in Llama."""
    first, second = vector.chunk(2)
    cos, sin = (distance * frequencies).cos(), (distance * frequencies).sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos])


def orthonormal(rows, columns, generator):
    """Random orthonormal rows ``[rows, columns]``."""
    square = torch.randn(columns, columns, generator=generator)
    return torch.linalg.qr(square)[0][:rows]


@torch.no_grad()
def add_heads_that_look_back(model, generator):
    """Make heads 0 and 1 of layer 0 carry the token before, and the one before that.

    Embeddings get a common direction, for a head without biases has no other constant: query and
    key point the same way in every token, so that the score depends on the distance alone.

    Returns:
        Where the residual stream then holds a token, the one before it and the second before it:
        three times ``[head_dim, hidden]``.
    """
    hidden, size = model.config.hidden_size, model.config.head_dim
    # Orthogonal to each other, so that no head hears what another one reads or writes.
    common, *rest = orthonormal(1 + 3 * size, hidden, generator)
    read, first, second = torch.stack(rest).split(size)
    model.model.embed_tokens.weight += math.sqrt(hidden) * common
    frequencies = model.model.rotary_emb.inv_freq
    key = torch.zeros(2, size // 2)
    key[:, :FAST] = 1 / math.sqrt(2 * FAST)
    key = key.flatten()
    # The normed embedding's share of the common direction is sqrt(hidden / 2).
    gain = math.sqrt(LOOK_BACK * math.sqrt(size) / (hidden / 2))
    attention = model.model.layers[0].self_attn
    for head, write in enumerate((first, second)):
        rows = slice(head * size, (head + 1) * size)
        query = at_distance(key, -head - 1, frequencies)
        attention.q_proj.weight[rows] += gain * torch.outer(query, common)
        attention.k_proj.weight[rows] += gain * torch.outer(key, common)
        attention.v_proj.weight[rows] = read
        attention.o_proj.weight[:, rows] = 2 * write.T
    return read, first, second


@torch.no_grad()
def add_induction_heads(model, tokens, generator):
    """Make the heads of layer 1 look for what followed two equal tokens, and repeat it.

    Even heads compare the query's token with the one before a key, odd heads the one before the
    query with the second before a key. They use their slow dimensions, which keep a match at any
    distance of the window.
    """
    hidden, size = model.config.hidden_size, model.config.head_dim
    slow = torch.nonzero(torch.arange(size) % (size // 2) >= size // 4)[:, 0]
    attention = model.model.layers[1].self_attn
    for head, (asked, kept) in enumerate(
        ((0, 1), (1, 2)) * (model.config.num_attention_heads // 2)
    ):
        part = slice(head // 2 * len(slow), (head // 2 + 1) * len(slow))
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows][slow] += MATCH * tokens[asked][part]
        attention.k_proj.weight[rows][slow] += MATCH * tokens[kept][part]
        repeat = orthonormal(size, hidden, generator)
        attention.v_proj.weight[rows] = repeat
        attention.o_proj.weight[:, rows] += COPY * repeat.T


def initial_model(vocabulary, layers, hidden, ffn, heads, window, seed):
    """Build the model; tokens look like themselves in the output layer, which is not tied."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=window,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)  # normal, 0.02
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:  # as Megatron scales what is added to the residual stream
            layer.self_attn.o_proj.weight /= math.sqrt(2 * layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * layers)
        # Large beside an optimizer's steps: what tokens look like must not drift while heads learn.
        model.model.embed_tokens.weight.normal_(generator=generator)
    add_induction_heads(model, add_heads_that_look_back(model, generator), generator)
    with torch.no_grad():
        model.lm_head.weight.copy_(config.initializer_range * model.model.embed_tokens.weight)
    return model


def main():
    """Write the model."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Megatron's other flags are allowed and ignored."
    )
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--tokenizer-model", required=True, help="gives the size of the vocabulary")
    for name in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args, _ = parser.parse_known_args()
    heads = args.num_attention_heads
    if args.num_layers < 2 or heads < 4 or heads % 2 or args.hidden_size % heads:
        parser.error(
            f"{args.num_layers} layers, {heads} heads, hidden size {args.hidden_size}: the circuit "
            "needs two layers or more and an even number of heads, at least 4, that divides the "
            "hidden size"
        )
    model = initial_model(
        load_tokenizer(args.tokenizer_model).vocab_size,
        args.num_layers,
        args.hidden_size,
        args.ffn_hidden_size,
        args.num_attention_heads,
        args.seq_length,
        args.seed,
    )
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
