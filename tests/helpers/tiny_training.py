"""A model small enough to train in seconds, and factors for twice its window."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config
from megatron_longrope.methods import yarn_factors

# Pre-trained on 64 tokens; now it sees 128.
MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 "
    "--swiglu --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 10000 "
    "--hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 255 --eval-iters 0 --eval-interval 100 "
    "--log-interval 1 --seed 1"
)
# A step more, and validation and test. The last of two equal flags counts.
EVALUATED = [*MODEL, "--train-iters", "3", "--eval-iters", "1"]
WINDOW = 64
HEAD_DIM = 16


def yarn_config(*ratios: float) -> LongRopeConfig:
    """All ones up to the window, and YaRN's factors for each of the ratios beyond."""
    sets = [FactorSet(WINDOW, (1.0,) * (HEAD_DIM // 2))]
    for ratio in ratios:
        factors = tuple(yarn_factors(HEAD_DIM, ratio, 10000.0, WINDOW))
        sets.append(FactorSet(int(ratio * WINDOW), factors))
    return LongRopeConfig(10000.0, HEAD_DIM, WINDOW, tuple(sets))


def write_ones(path: Path) -> Path:
    """A factor file that must change nothing: it covers the 128 tokens with ones."""
    identity_config(10000.0, HEAD_DIM, 2 * WINDOW).save(path)
    return path


def write_factors(path: Path) -> Path:
    """YaRN's factors for twice the window; the attention factor is 1.08012."""
    yarn_config(2.0).save(path)
    return path


def refusal(statuses: Sequence[int], log: str) -> str:
    """The one sentence that ended a run on every rank, before its first iteration."""
    assert all(statuses)
    told = [line for line in log.splitlines() if line.startswith("longrope: error: ")]
    assert len(told) == 1, told
    assert "iteration        1/" not in log
    # torchrun prints a traceback of its own.
    assert not re.search(r'File ".*(megatron_longrope|megatron/training)/', log)
    return told[0].removeprefix("longrope: error: ")
