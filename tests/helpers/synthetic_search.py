"""A search problem whose objective is a formula: no model, microseconds per sample."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from megatron_longrope.config import identity_config
from megatron_longrope.factor_search.problem import SearchProblem, make_problem

TARGET = 2048


def small_problem(start_tokens: tuple[int, ...] = (0, 4, 16), **options) -> SearchProblem:
    """A first search from 256 to 2048 tokens with 16 factors."""
    return make_problem(
        identity_config(10000.0, 32, 256), TARGET, start_tokens=start_tokens, **options
    )


class Synthetic:
    """Losses that are lowest for factors rising as a square, four start tokens and su.

    Args:
        fail_after (int, optional): Interrupt after so many samples.
        failures (dict, optional): What happens to the second sample of the candidate that is the
            n-th to be started: an exception to raise, or a loss.
        offset (float): Loss of the best candidate.
        noise (float): Spread of the samples around a candidate's loss.
        samples_per_forward (int): See :class:`PerplexityObjective`.
        seconds (float): How long a sample takes.
    """

    num_samples = 5

    def __init__(
        self,
        fail_after: int | None = None,
        failures: dict[int, object] | None = None,
        *,
        offset: float = 2.0,
        noise: float = 0.02,
        samples_per_forward: int = 1,
        seconds: float = 0.0,
    ) -> None:
        self.calls = 0
        self.samples_per_forward = samples_per_forward
        self._fail_after, self._failures = fail_after, failures or {}
        self._offset, self._noise, self._seconds = offset, noise, seconds
        self._started = -1

    def losses(self, config, first):
        count = min(self.samples_per_forward, self.num_samples - first)
        return [self._loss(config, index) for index in range(first, first + count)]

    def _loss(self, config, index):
        self._started += index == 0
        if self._fail_after is not None and self.calls >= self._fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self._seconds)
        if index == 1 and self._started in self._failures:
            failure = self._failures[self._started]
            if isinstance(failure, BaseException):
                raise failure
            return failure
        item = config.factor_set_for(TARGET)
        target = [1 + 7 * (i / 15) ** 2 for i in range(16)]
        difference = np.log(item.rescale_factors) - np.log(target)
        loss = self._offset + float(np.sqrt(np.mean(difference**2)))
        loss += 0.01 * abs(item.num_start_tokens - 4)
        loss += 0.2 - 0.5 * (config.attention_factor_for(TARGET) - 1)
        # Samples differ, and so does what each of them makes of a candidate.
        own = np.random.default_rng([index, *(int(100 * v) for v in item.rescale_factors)])
        return loss * (1 + 0.1 * index) + self._noise * float(own.random())


def drop_seconds(path: str | Path) -> list[dict]:
    """A journal's records in the order of asking, without what depends on the machine."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]
    return sorted(
        ({k: v for k, v in item.items() if k != "seconds"} for item in records),
        key=lambda item: item["index"],
    )
