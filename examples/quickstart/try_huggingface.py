"""Load an exported model with transformers and compare it with its Megatron checkpoint.

    python examples/quickstart/try_huggingface.py --hf build/quickstart/hf \
        --load build/quickstart/checkpoints/finetuned \
        --longrope-config build/quickstart/factors/final.json \
        --data build/quickstart/data/heldout --lengths 256,8k --output check.json

Three checks: logits below and above the original window (both factor sets), perplexity of held-out
text, and greedy text that crosses the window, where transformers changes from short to long.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.verify import exported_config, verify
from megatron_longrope.data.documents import read_documents, read_manifest
from megatron_longrope.engine import load_engine
from megatron_longrope.evaluation.perplexity import perplexity
from megatron_longrope.files import write_json_atomic
from megatron_longrope.lengths import parse_lengths
from megatron_longrope.local_folder import LOCAL_ONLY

CROSSING = 8  # tokens generated on either side of the switch


def transformers_nll(model):
    """Token losses `[1, n] -> [1, n - 1]` of a transformers model."""

    @torch.no_grad()
    def nll(tokens):
        logits = model(tokens).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[None]

    return nll


@torch.no_grad()
def generate_across(model, engine, tokens, window):
    """Greedy text from both models across the window, without a cache; returns ids and agreement.

    Llama in transformers keeps keys of the short factors in its cache when it switches, so a text
    that crosses the window is right only without the cache.
    """
    start = tokens[: window - CROSSING][None]
    generated = model.generate(
        start, max_new_tokens=2 * CROSSING, do_sample=False, use_cache=False, pad_token_id=0
    )
    ids, agree = generated[0].tolist(), 0
    for end in range(start.shape[1], len(ids)):
        agree += int(engine.answer(generated[:, :end], 1).predicted[-1] == ids[end])
    return ids, agree / (len(ids) - start.shape[1])


def main():
    """Compare and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", required=True, help="exported folder")
    parser.add_argument("--load", required=True, help="Megatron checkpoint")
    parser.add_argument("--longrope-config", required=True, help="factors of the export")
    parser.add_argument("--data", required=True, help="held-out documents")
    parser.add_argument("--lengths", required=True, type=parse_lengths)
    parser.add_argument("--num-documents", type=int, default=2)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    config = LongRopeConfig.load(args.longrope_config)
    window = config.original_max_position_embeddings
    report = verify(args.load, args.hf, longrope_config=config)
    model = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32, **LOCAL_ONLY).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.hf, **LOCAL_ONLY)
    # Transformers holds two factor sets; Megatron's sets between them are left out on our side too.
    engine = load_engine(
        args.load, longrope_config=exported_config(config), device="cpu", hf_parity=True
    )
    bos_id = read_manifest(args.data)["bos_id"]
    documents = read_documents(
        args.data, min_length=max(args.lengths) - 1, limit=args.num_documents
    )
    result = {
        **{f"max_abs_logit_diff_{item.window}": item.max_abs_diff for item in report.windows},
        "perplexity_transformers": {},
        "perplexity_megatron": {},
    }
    for length in args.lengths:
        theirs = perplexity(transformers_nll(model), documents, bos_id, length)
        ours = perplexity(engine.nll, documents, bos_id, length)
        result["perplexity_transformers"][str(length)] = theirs.ppl_window_mean
        result["perplexity_megatron"][str(length)] = ours.ppl_window_mean
        print(
            f"perplexity at {length}: transformers {theirs.ppl_window_mean:.6f}, "
            f"megatron {ours.ppl_window_mean:.6f}"
        )
    prompt = torch.tensor([bos_id, *documents[0][:window].tolist()])
    ids, agreement = generate_across(model, engine, prompt, window)
    result["greedy_agreement_across_switch"] = agreement
    result["generated_across_switch"] = tokenizer.decode(ids[window - 2 * CROSSING :])
    print(f"greedy tokens across the switch at {window}: {agreement:.0%} equal to Megatron's")
    print(f"text: {result['generated_across_switch']!r}")
    write_json_atomic(args.output, result)


if __name__ == "__main__":
    main()
