"""Score one trial: sample by sample, racing an incumbent if any, not dying of a bad candidate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import Evaluation
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.problem import SearchProblem
from megatron_longrope.factor_search.racing import losing_bound
from megatron_longrope.out_of_memory import is_out_of_memory


def score_trial(
    trial: Trial,
    problem: SearchProblem,
    objective: PerplexityObjective,
    *,
    known: Sequence[float] = (),
    incumbent: Sequence[float] | None = None,
) -> Evaluation:
    """The evaluation of a trial.

    A pure function of the trial, the incumbent's losses and the model: known losses save forward
    passes and change nothing else.

    Args:
        known (Sequence[float]): Losses of the candidate's first samples, from an earlier trial.
        incumbent (Sequence[float], optional): Losses of the trial's incumbent on all samples; the
            trial races them. Defaults to scoring every sample that it asks for.

    Returns:
        Evaluation: With the reason instead of a score when memory ran out or a loss is not finite.
    """
    started = time.perf_counter()
    target = problem.factor_set(trial.candidate)
    config = problem.config(trial.candidate)
    wanted = objective.num_samples if trial.samples is None else trial.samples
    losses: list[float] = []
    stopped = error = None
    mean = math.inf
    try:
        while len(losses) < wanted:
            # Whole forward passes, known or not, so that races look at the same places.
            first = len(losses)
            batch = list(known[first : first + objective.samples_per_forward])
            losses += batch or objective.losses(config, first)
            if bad := [i for i in range(first, len(losses)) if not math.isfinite(losses[i])]:
                error = f"the loss of sample {bad[0]} is {losses[bad[0]]}"
                break
            if incumbent is not None and (bound := losing_bound(losses, incumbent)) is not None:
                stopped, mean = "exact", bound
                break
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        error = f"out of memory: {str(failure).splitlines()[0]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if error is None and stopped is None:
        mean = math.fsum(losses[:wanted]) / wanted
        stopped = "budget" if wanted < objective.num_samples else None
    try:
        score = math.exp(mean)
    except OverflowError:
        score, error = math.inf, f"a mean loss of {mean:.6g} nats is no perplexity"
    return Evaluation(
        target.rescale_factors,
        target.num_start_tokens,
        math.inf if error else score,
        tuple(losses),
        time.perf_counter() - started,
        error,
        trial.index,
        None if error else stopped,
    )
