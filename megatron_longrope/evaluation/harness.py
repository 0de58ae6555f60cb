"""Tasks of lm-evaluation-harness, an optional dependency."""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_tasks import (
    PAPER_TASKS,
    LoadedTask,
    TaskSpec,
    check_original_factors,
    check_tasks,
    downloads,
    parse_tasks,
    quiet_other_ranks,
    require_lm_eval,
)
from megatron_longrope.ranks import rank

__all__ = [
    "PAPER_TASKS",
    "LoadedTask",
    "TaskSpec",
    "check_original_factors",
    "check_tasks",
    "count_requests",
    "harness_lm",
    "parse_tasks",
    "run_tasks",
]

_BOOTSTRAP = 100_000  # resamples behind the error of metrics without a formula, as in lm-eval


def harness_lm(engine: Any, tokenizer: Any, **options: Any) -> Any:
    """The engine as an lm-eval model.

    Args:
        engine (Engine): The checkpoint.
        tokenizer (Tokenizer): Its tokenizer, from :func:`.data.tokenizer.load_tokenizer`.
        options: Those of :class:`.harness_model.EngineLM`: window, max_length, batch_size, add_bos,
            max_gen_toks, long_prompts, seed.

    Returns:
        EngineLM: Give it to :func:`run_tasks`, or to lm-eval's own functions on every rank.

    Raises:
        LongRopeError: lm-eval is missing, or as :class:`.harness_model.EngineLM`.
    """
    require_lm_eval()
    from megatron_longrope.evaluation.harness_model import EngineLM

    return EngineLM(engine, tokenizer, **options)


def count_requests(
    tokenizer: Any,
    task: LoadedTask,
    max_length: int,
    *,
    long_prompts: str = "truncate",
    limit: int | float | None = None,
    seed: int = 1234,
    allow_download: bool = False,
) -> Any:
    """Build what a task will ask, without a model.

    Args:
        tokenizer (Tokenizer): The model's.
        task (LoadedTask): From :func:`check_tasks`.
        max_length (int): Longest model input in tokens.
        long_prompts (str): See :class:`.harness_requests.RequestReader`.
        limit (int | float, optional): As in :func:`run_tasks`, as are seed and allow_download.

    Returns:
        RequestCounter: Lengths, truncated requests and a hash of all of them.

    Raises:
        LongRopeError: A request could not be asked, such as one that is too long.
    """
    from lm_eval.evaluator_utils import get_sample_size

    from megatron_longrope.evaluation.harness_requests import RequestCounter

    _check_limit(limit)
    _seed(task, seed)
    requests: dict[str, list[Any]] = defaultdict(list)
    counter = RequestCounter(tokenizer, max_length, long_prompts=long_prompts)
    with downloads(allow_download), quiet_other_ranks():
        for leaf in task.content["tasks"].values():
            leaf.build_all_requests(limit=get_sample_size(leaf, limit))
            for instance in leaf.instances:
                requests[instance.request_type].append(instance)
            leaf._instances = None  # the texts may be long; lm-eval builds them again
    try:
        for kind, some in requests.items():
            getattr(counter, kind)(some)
    except LongRopeError as error:
        raise LongRopeError(f"task {task.spec.name}: {error}") from None
    return counter


def run_tasks(
    lm: Any,
    tasks: Sequence[TaskSpec | LoadedTask],
    *,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    seed: int = 1234,
    allow_download: bool = False,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure tasks one after the other.

    Args:
        lm (EngineLM): From :func:`harness_lm`; any lm-eval model will do.
        tasks (Sequence): Specs, or what :func:`check_tasks` returned, which are not loaded again.
        include_path (str | Path, optional): As in :func:`check_tasks`.
        limit (int | float, optional): Questions of each task, or their share if below 1, for trial
            runs.
        seed (int): Draws the few-shot examples. Defaults to 1234, lm-eval's own.
        allow_download (bool): As in :func:`check_tasks`.
        on_result (Callable, optional): Called with each record before it is yielded.

    Returns:
        Iterator[dict]: A record per task, the same on every rank.

    Raises:
        LongRopeError: As :func:`check_tasks`, at once; or a limit that leaves nothing.
    """
    _check_limit(limit)
    specs = [task for task in tasks if isinstance(task, TaskSpec)]
    fresh = iter(
        check_tasks(specs, include_path=include_path, allow_download=allow_download)
        if specs
        else ()
    )
    loaded = [next(fresh) if isinstance(task, TaskSpec) else task for task in tasks]

    def records() -> Iterator[dict[str, Any]]:
        for task in loaded:
            with downloads(allow_download), quiet_other_ranks():
                record = _of_rank_zero(_measure(lm, task, limit, seed))
            if on_result is not None:
                on_result(record)
            yield record

    return records()


def _check_limit(limit: int | float | None) -> None:
    if limit is not None and not limit > 0:
        raise LongRopeError(f"limit {limit} leaves no question; give a number above 0")


def _seed(task: LoadedTask, seed: int) -> None:
    """Do what lm-eval's simple_evaluate does before each run, so that few-shot examples repeat."""
    random.seed(0)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for leaf in task.content["tasks"].values():
        leaf.set_fewshot_seed(seed=seed)


def _measure(lm: Any, task: LoadedTask, limit: int | float | None, seed: int) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    started, truncated = time.perf_counter(), getattr(lm, "num_truncated", 0)
    _seed(task, seed)
    # Not simple_evaluate: it returns results to local rank 0 alone and asks pip for all versions.
    results = evaluate(
        lm=lm,
        task_dict=task.content,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP if rank() == 0 else 0,  # it takes every core; once is enough
        log_samples=False,
    )
    spec, scores = task.spec, results["results"]
    found = {**scores, **results.get("groups", {})}[spec.name]
    metrics = {key: value for key, value in found.items() if "," in key}
    name, filters = _main_key(metrics, spec)
    error = metrics.get(f"{spec.metric}_stderr,{filters}")
    return {
        "task": spec.name,
        "num_fewshot": spec.num_fewshot,
        "metric": spec.metric,
        "value": float(metrics[name]),
        "stderr": float(error) if isinstance(error, int | float) else None,
        "metrics": {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if "_stderr," not in key and isinstance(value, int | float)
        },
        "samples": sum(item["effective"] for item in results["n-samples"].values()),
        "limit": limit,
        "max_length": getattr(lm, "max_length", None),
        "truncated": getattr(lm, "num_truncated", 0) - truncated,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "seconds": time.perf_counter() - started,
    }


def _main_key(metrics: dict[str, Any], spec: TaskSpec) -> tuple[str, str]:
    """The key of the reported metric and its filter, the first if answers pass several."""
    for key in metrics:
        name, _, filters = key.partition(",")
        if name == spec.metric:
            return key, filters
    raise LongRopeError(
        f"task {spec.name} returned no {spec.metric}; it has {', '.join(metrics) or 'no metric'}"
    )


def _of_rank_zero(record: dict[str, Any]) -> dict[str, Any]:
    """The record of rank 0, the only one with resampled errors, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return record
    box = [record]
    dist.broadcast_object_list(box, src=0)
    return box[0]
