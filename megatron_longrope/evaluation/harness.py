"""Tasks of lm-evaluation-harness: what they will ask, and what a model answers."""

from __future__ import annotations

import importlib.metadata
import time
from collections import defaultdict
from typing import Any

from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.harness_definition import definition
from megatron_longrope.evaluation.harness_tasks import (
    LoadedTask,
    TaskSpec,
    downloads,
    quiet_other_ranks,
    seed_libraries,
)
from megatron_longrope.ranks import rank

_BOOTSTRAP = 100_000  # resamples behind the error of metrics without a formula, as in lm-eval


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
        task (LoadedTask): From :func:`.harness_tasks.check_tasks`.
        max_length (int): Longest model input in tokens.
        long_prompts (str): See :class:`.harness_requests.RequestReader`.
        limit (int | float, optional): As in :func:`measure_task`, as are seed and allow_download.

    Returns:
        RequestCounter: Lengths, truncated requests, and a hash of all that the score depends on.

    Raises:
        LongRopeError: A request could not be asked, such as one that is too long.
    """
    from lm_eval.evaluator_utils import get_sample_size

    from megatron_longrope.evaluation.harness_requests import RequestCounter

    _seed(task, seed)
    requests: dict[str, list[Any]] = defaultdict(list)
    counter = RequestCounter(tokenizer, max_length, long_prompts=long_prompts)
    counter.add_definition(definition(task.content))
    with downloads(allow_download), quiet_other_ranks():
        for leaf in task.content["tasks"].values():
            leaf.build_all_requests(limit=get_sample_size(leaf, limit))
            for instance in leaf.instances:
                if instance.idx == 0:  # the first request of a document
                    counter.add_document(instance.doc)
                requests[instance.request_type].append(instance)
            leaf._instances = None  # the texts may be long; lm-eval builds them again
    try:
        for kind, some in requests.items():
            getattr(counter, kind)(some)
    except LongRopeError as error:
        raise LongRopeError(f"task {task.spec.name}: {error}") from None
    return counter


def measure_task(
    lm: Any,
    task: LoadedTask,
    *,
    limit: int | float | None = None,
    seed: int = 1234,
    allow_download: bool = False,
) -> dict[str, Any]:
    """Ask a model all questions of a task; every rank takes part.

    Args:
        lm (EngineLM): The model; any that lm-eval knows will do.
        task (LoadedTask): From :func:`.harness_tasks.check_tasks`.
        limit (int | float, optional): Questions, or their share if below 1, for trial runs.
        seed (int): Draws the few-shot examples. Defaults to 1234, lm-eval's own.
        allow_download (bool): As in :func:`.harness_tasks.check_tasks`.

    Returns:
        dict: A record, that of the first rank, the only one with resampled errors.

    Raises:
        LongRopeError: The task gave no value of its metric.
    """
    from lm_eval.evaluator import evaluate

    from megatron_longrope.engine.process_groups import from_first_rank

    started, truncated = time.perf_counter(), getattr(lm, "num_truncated", 0)
    _seed(task, seed)
    with downloads(allow_download), quiet_other_ranks():
        # Not simple_evaluate: it gives results to local rank 0 alone and asks pip for all versions.
        results = evaluate(
            lm=lm,
            task_dict=task.content,
            limit=limit,
            # The resampling takes every core; once is enough.
            bootstrap_iters=_BOOTSTRAP if rank() == 0 else 0,
            log_samples=False,
        )
    for leaf in task.content["tasks"].values():
        leaf._instances = None  # with the texts, as above
    spec, scores = task.spec, results["results"]
    found = {**scores, **results.get("groups", {})}[spec.name]
    metrics = {key: value for key, value in found.items() if "," in key}
    name, filters = _main_key(metrics, spec)
    error = metrics.get(f"{spec.metric}_stderr,{filters}")
    record = {
        "task": spec.name,
        "num_fewshot": spec.num_fewshot,
        "metric": spec.metric,
        "value": float(metrics[name]),
        "higher_is_better": results["higher_is_better"].get(spec.name, {}).get(spec.metric),
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
    return from_first_rank(record)


def _seed(task: LoadedTask, seed: int) -> None:
    """Do what lm-eval's simple_evaluate does before each run, so that few-shot examples repeat."""
    seed_libraries(seed)
    for leaf in task.content["tasks"].values():
        leaf.set_fewshot_seed(seed=seed)


def _main_key(metrics: dict[str, Any], spec: TaskSpec) -> tuple[str, str]:
    """The key of the reported metric and its filter, the first if answers pass several."""
    for key in metrics:
        name, _, filters = key.partition(",")
        if name == spec.metric:
            return key, filters
    raise LongRopeError(
        f"task {spec.name} returned no {spec.metric}; it has {', '.join(metrics) or 'no metric'}"
    )
