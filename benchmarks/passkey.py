"""Passkey trials: seconds and forward passes, teacher-forced against the released script's way.

    python benchmarks/passkey.py            # 2k and 8k tokens, four trials each
    python benchmarks/passkey.py --quick    # 1k and 2k tokens, a smaller model, two trials

Claim: one forward pass gives the verdict that the released LongRoPE and YaRN scripts need ten for.

`ours` is `Engine.answer` on prompt and answer: one forward pass, logits at the answer's positions.
`released` is how those scripts decode: `generate` of transformers, ten greedy tokens, no cache, and
at each step the logits of all positions (`logits_to_keep=0`; recent transformers keep one row by
default). `cached` is the other way with one long pass, `generate` with a cache and one row of
logits; it holds the keys and values of every layer. All three have the same random Llama in fp32,
the same LongRoPE factors and the same trials, and take turns on one thread; seconds are CPU seconds
of the process.

That it is the same test is checked beside the clock. Random weights find no key, so that the
verdicts alone would say little: what `released` wrote is also put behind the prompt as if it were
the answer, and teacher forcing has to choose each of its tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

import measure
import torch
from measure import Geometry
from torch import Tensor, nn
from train_tokenizer import train_sentencepiece

from megatron_longrope.checkpoint.hf.checkpoint import HfCheckpoint
from megatron_longrope.data.tokenizer import Tokenizer, load_tokenizer
from megatron_longrope.engine import Engine, load_engine
from megatron_longrope.evaluation.passkey_prompt import (
    MAX_NEW_TOKENS,
    PasskeyTrial,
    check_tokenizer,
    is_retrieved,
    make_trial,
    parse_answer,
    prompt,
)
from megatron_longrope.local_folder import LOCAL_ONLY

ARMS = ("ours", "released", "cached")
SEED = 42


@dataclass(frozen=True)
class Plan:
    """What one run of this script measures."""

    geometry: Geometry
    lengths: tuple[int, ...]
    trials: int


FULL = Plan(Geometry(4, 256, 32000), (2048, 8192), 4)
QUICK = Plan(Geometry(2, 256, 8192), (1024, 2048), 2)


def make_tokenizer(directory: Path) -> Tokenizer:
    """Llama 2's way with numbers: a token for the space, one for each digit."""
    texts = [prompt(key, 200, 100) for key in range(1, 50000, 997)]
    train_sentencepiece(texts, directory / "tokenizer.model", 420)
    return load_tokenizer(directory / "tokenizer.model")


class Comparison:
    """The arms over the same trials, with what they answered.

    Args:
        engine (Engine): Ours.
        model (nn.Module): transformers' model with the same weights.
        tokenizer (Tokenizer): Makes the trials.
        trials (Sequence[PasskeyTrial]): The first is for warming up.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, tokenizer: Tokenizer, trials: Sequence[PasskeyTrial]
    ) -> None:
        self.engine, self.model, self.tokenizer, self.trials = engine, model, tokenizer, trials
        self.verdicts: dict[str, list[bool]] = {arm: [] for arm in ARMS}
        self.forwards = dict.fromkeys(ARMS, 0)
        self.generated: list[Tensor] = []

    def run(self) -> dict[str, list[float]]:
        """CPU seconds of every trial, by arm."""
        functions = {arm: self._next_trial(arm) for arm in ARMS}
        return measure.sample_interleaved(
            functions, len(self.trials) - 1, warmup=1, clock=time.process_time
        )

    def reproduced(self) -> tuple[int, int]:
        """Generated tokens that teacher forcing chooses too, and how many there are."""
        same = total = 0
        for trial, generated in zip(self.trials, self.generated, strict=True):
            tokens = torch.cat([torch.tensor(trial.prompt_tokens), generated])[None]
            predicted = self.engine.answer(tokens, len(generated)).predicted[:-1]
            pairs = zip(predicted, generated.tolist(), strict=True)
            same += sum(ours == theirs for ours, theirs in pairs)
            total += len(generated)
        return same, total

    def _next_trial(self, arm: str) -> Callable[[], None]:
        """A function that takes one trial after the other."""
        trials = iter(self.trials)
        counted = self.engine.model if arm == "ours" else self.model

        def count(*_: Any) -> None:
            self.forwards[arm] += 1

        def score() -> None:
            with counted.register_forward_hook(count):
                self.verdicts[arm].append(self._verdict(arm, next(trials)))

        return score

    def _verdict(self, arm: str, trial: PasskeyTrial) -> bool:
        if arm == "ours":
            answer = self.engine.answer(torch.tensor([trial.tokens]), trial.num_answer_tokens)
            return is_retrieved(answer.predicted, trial, self.tokenizer)
        start = torch.tensor([trial.prompt_tokens])
        options = {"use_cache": True} if arm == "cached" else {"use_cache": False}
        if arm == "released":
            options["logits_to_keep"] = 0  # all of them
        with torch.no_grad():
            tokens = self.model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                **options,
            )
        written = tokens[0, start.shape[1] :]
        if arm == "released":
            self.generated.append(written)
        # The model has more rows than the tokenizer has tokens; those have no text.
        known = [token for token in written.tolist() if token < self.tokenizer.vocab_size]
        return parse_answer(self.tokenizer.decode(known)) == trial.key


def compare(
    engine: Engine, model: nn.Module, tokenizer: Tokenizer, length: int, count: int
) -> dict[str, Any]:
    """One row of the result.

    Raises:
        RuntimeError: Verdicts or tokens differ, so that the arms did not do the same test.
    """
    trials = [
        make_trial(tokenizer, length, depth=None, seed=SEED, trial=number)
        for number in range(count + 1)
    ]
    comparison = Comparison(engine, model, tokenizer, trials)
    samples = comparison.run()
    same, total = comparison.reproduced()
    if same < total or len(set(map(tuple, comparison.verdicts.values()))) > 1:
        raise RuntimeError(
            f"at {length} tokens the arms disagree: verdicts {comparison.verdicts}, {same} of "
            f"{total} generated tokens reproduced; it is not the same test"
        )
    ratios = {
        arm: [round(value, 4) for value in measure.paired_ratios(samples["ours"], samples[arm])]
        for arm in ARMS[1:]
    }
    return {
        "tokens": length,
        "trials": count,
        "forwards_per_trial": {
            arm: comparison.forwards[arm] / len(trials) for arm in comparison.forwards
        },
        "seconds": {arm: round(statistics.median(samples[arm]), 4) for arm in ARMS},
        "ratio": ratios["released"][1],
        "ratio_quartiles": ratios["released"],
        "ratio_to_cached": ratios["cached"][1],
        "retrieved": sum(comparison.verdicts["ours"][1:]),
        "tokens_reproduced": same,
        "tokens_generated": total,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; refuses what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, short prompts")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of a trial")
    parser.add_argument("--trials", type=int, help="trials that are timed, for each length")
    options = parser.parse_args(arguments)
    if options.trials is not None and options.trials < 1:
        parser.error(f"--trials {options.trials} must be at least 1")
    return options


def main() -> None:
    """Measure, print a table and the result."""
    from transformers import AutoModelForCausalLM

    options = parse()
    torch.set_num_threads(1)
    plan = QUICK if options.quick or options.lengths else FULL
    lengths = sorted(set(options.lengths or plan.lengths))
    measure.print_environment()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = make_tokenizer(Path(directory))
        print(f"tokenizer: {check_tokenizer(tokenizer)}", flush=True)
        folder = Path(directory) / "model"
        # No EOS: ten tokens always.
        measure.write_llama(
            folder, plan.geometry, lengths[-1],
            room=MAX_NEW_TOKENS, seed=SEED, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", **LOCAL_ONLY
        ).eval()
        engine = load_engine(HfCheckpoint(folder), dtype=torch.float32)
        for length in lengths:
            rows.append(compare(engine, model, tokenizer, length, options.trials or plan.trials))
            print(f"{length} tokens: done", file=sys.stderr, flush=True)
    measure.print_table(
        ("tokens", *(f"{arm} {what}" for arm in ARMS for what in ("passes", "s")), "ratio"),
        [
            (
                row["tokens"],
                *(
                    cell
                    for arm in ARMS
                    for cell in (
                        f"{row['forwards_per_trial'][arm]:g}",
                        f"{row['seconds'][arm]:.3f}",
                    )
                ),
                f"{row['ratio']:.4f}",
            )
            for row in rows
        ],
    )
    reproduced, generated = (
        sum(row[name] for row in rows) for name in ("tokens_reproduced", "tokens_generated")
    )
    print(f"verdicts agree; {reproduced} of {generated} generated tokens reproduced in one pass")
    measure.finish(
        "passkey",
        max(row["ratio"] for row in rows),
        full_run=not (options.quick or options.lengths or options.trials),
        ratio_of="CPU seconds of a trial, ours / released, median over neighbouring trials, worst "
        "length",
        ratio_to_cached=max(row["ratio_to_cached"] for row in rows),
        verdicts_agree=True,
        geometry=asdict(plan.geometry) | {"head_dim": measure.HEAD_DIM},
        dtype="float32",
        rows=rows,
        transformers=measure._version("transformers"),
    )


if __name__ == "__main__":
    main()
