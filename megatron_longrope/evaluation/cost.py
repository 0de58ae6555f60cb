"""How long an evaluation will take, from trial passes of growing length.

A forward pass takes its products with weights, linear in the length, and its attention, quadratic.
They run at different speeds, and their shares change with the length: one speed measured at 4k
would be wrong at 32k. Two trial passes tell both speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longrope.flops import forward_flops

_FIRST = 512  # tokens of the first trial pass
_SHARE, _SECONDS = 0.05, 120.0  # of what is to come, and at most: the next trial pass
_STEPS = 8  # tokens generated to time one


@dataclass(frozen=True)
class Speed:
    """What operations of one kind take in this process."""

    weights: float
    """Seconds of an operation in products with weights."""
    attention: float
    """Seconds of an operation in attention."""
    longest: int
    """Tokens of the longest trial pass."""

    def forward(self, shape: Any, tokens: int) -> float:
        """Return the seconds of a forward pass of so many tokens."""
        weights, attention = forward_flops(shape, tokens)
        return weights * self.weights + attention * self.attention


def measure_speed(
    run: Callable[[int], float], shape: Any, passes: Mapping[int, int], step: int = 1
) -> Speed:
    """Measure trial passes, twice as long each, until the next would be a burden.

    Args:
        run (Callable): Seconds of a pass of so many tokens, alike on every rank.
        shape (ModelShape): Of the model.
        passes (Mapping[int, int]): How many passes of which length are to come.
        step (int): What a length must be a multiple of. Defaults to 1.
    """

    def fitting(tokens: int) -> int:
        return max(step, tokens // step * step)

    longest, trials = fitting(max(passes)), {}
    length = fitting(min(longest, _FIRST))
    while True:
        # A first pass of a length builds tables and chooses kernels.
        trials[length] = min(run(length) for _ in range(2))
        speed = fit_speed(trials, shape)
        following = min(2 * length, longest)
        to_come = sum(count * speed.forward(shape, tokens) for tokens, count in passes.items())
        cost = 2 * speed.forward(shape, following)
        if following == length or (len(trials) > 1 and cost > min(_SHARE * to_come, _SECONDS)):
            return speed
        length = fitting(following)


def fit_speed(trials: Mapping[int, float], shape: Any) -> Speed:
    """Solve for both speeds from seconds by length: of the two longest, most like what comes.

    Where noise would make one of them negative, or there is but one pass, operations of both kinds
    count the same.
    """
    *before, longest = sorted(trials)
    weights, attention = forward_flops(shape, longest)
    if before:
        few_weights, few_attention = forward_flops(shape, before[-1])
        determinant = weights * few_attention - few_weights * attention
        first = (trials[longest] * few_attention - trials[before[-1]] * attention) / determinant
        second = (trials[before[-1]] * weights - trials[longest] * few_weights) / determinant
        if first > 0 and second > 0:
            return Speed(first, second, longest)
    alike = trials[longest] / (weights + attention)
    return Speed(alike, alike, longest)


@dataclass(frozen=True)
class StepSpeed:
    """What generating a token takes behind a prompt: the weights, and keys and values so far."""

    fixed: float
    """Seconds."""
    per_token: float
    """Seconds for each token of the prompt."""

    def step(self, tokens: int) -> float:
        """Return the seconds of a token behind so many."""
        return self.fixed + self.per_token * tokens


def measure_steps(run: Callable[[int, int], float], lengths: Iterable[int]) -> StepSpeed:
    """Time generated tokens behind a short and a longer prompt.

    Args:
        run (Callable): Seconds of (tokens of the prompt, new tokens), alike on every rank.
        lengths (Iterable[int]): Tokens of the prompts.
    """
    shortest, longest = min(lengths), max(lengths)

    def step(tokens: int) -> float:
        once = min(run(tokens, 1) for _ in range(2))
        return max(0.0, run(tokens, 1 + _STEPS) - once) / _STEPS

    short = step(shortest)
    if longest == shortest:
        return StepSpeed(short, 0.0)
    slope = max(0.0, step(longest) - short) / (longest - shortest)
    return StepSpeed(max(0.0, short - slope * shortest), slope)
