"""Run exported folders in vLLM, in its own environment: `python vllm_reads.py JOBS OUTPUT`.

JOBS is a list of {"folder", "room", "prompts"}: `room` is `max_model_len`, prompts are token ids.
OUTPUT has the log-probabilities of each prompt's tokens from the second on, and those of a greedy
continuation with its tokens.
"""

import json
import os
import sys
from pathlib import Path

# One process, so that the engine ends with it; a GiB for keys and values.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
NEW_TOKENS = 8


def run(folder, room, prompts):
    """The rows of one job."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=folder,
        max_model_len=room,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )
    greedy = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    done = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    return [
        {
            "prompt": chosen(one.prompt_logprobs[1:], prompt[1:]),
            "tokens": list(one.outputs[0].token_ids),
            "continuation": chosen(one.outputs[0].logprobs, one.outputs[0].token_ids),
        }
        for one, prompt in zip(done, prompts, strict=True)
    ]


def chosen(positions, tokens):
    """Log-probability of each token at its position."""
    return [at[token].logprob for at, token in zip(positions, tokens, strict=True)]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(**job) for job in jobs]))
