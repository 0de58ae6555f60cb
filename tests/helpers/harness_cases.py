"""A tokenizer for the tiny checkpoints, lm-eval's own model of an exported folder, and requests."""

from pathlib import Path

import make_megatron_checkpoint as maker
import pytest

from megatron_longrope.evaluation.harness import measure_task

WORDS = ["window", "rotary", "position", "context", "length", "factor", "search", "segment", "of"]
SYLLABLES = [
    "win",
    "dow",
    "ro",
    "ta",
    "ry",
    "con",
    "text",
    "len",
    "gth",
    "fac",
    "tor",
    "se",
    "arch",
]
TEXT = [
    f"the {a} of {b}, {c}. Answer: A B C D {i % 10} {x}{y} {y}{x}{z}\n"
    for i, a in enumerate(WORDS)
    for b in WORDS
    for c in WORDS
    for x, y, z in [(SYLLABLES[(i + len(b)) % 12], SYLLABLES[len(a + c) % 12], SYLLABLES[i % 12])]
]
SCORED = ("task", "num_fewshot", "metric", "value", "stderr", "metrics", "samples", "limit")


def train_tokenizer(directory: Path) -> Path:
    """A sentencepiece model as large as the tiny checkpoints' vocabulary."""
    import sentencepiece

    prefix = directory / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=maker.VOCAB,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def hf_model(folder: Path, max_length: int):
    """lm-eval's own model of an exported folder."""
    pytest.importorskip("accelerate")  # lm-eval's hf model needs it, ours does not
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(str(folder)),
        max_length=max_length,
        batch_size=1,
    )


def engine_lm(engine, tokenizer, **options):
    """Our model as lm-eval knows it; imported late, because lm-eval may be missing."""
    from megatron_longrope.evaluation.harness_model import EngineLM

    return EngineLM(engine, tokenizer, **options)


def run_tasks(lm, tasks, **how):
    """The records of what `check_tasks` returned."""
    return [measure_task(lm, task, **how) for task in tasks]


def requests(kind, arguments):
    """lm-eval's requests of a kind."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, item, index) for index, item in enumerate(arguments)]


def likelihoods(lm, pairs):
    """Of (context, continuation)."""
    return lm.loglikelihood(requests("loglikelihood", pairs))


def rolling(lm, texts):
    """Of whole texts."""
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))


def generated(lm, pairs):
    """Of (context, arguments)."""
    return lm.generate_until(requests("generate_until", pairs))


def assert_same(first, second, tolerance):
    assert len(first) == len(second)
    for (value, greedy), (other, other_greedy) in zip(first, second, strict=True):
        assert value == pytest.approx(other, abs=tolerance)
        assert greedy is other_greedy


def assert_same_scores(first, second, rel):
    for name in SCORED:
        numbers = isinstance(first[name], float | dict)
        assert first[name] == (pytest.approx(second[name], rel=rel) if numbers else second[name])
