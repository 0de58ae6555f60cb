"""Tasks of lm-evaluation-harness: naming, finding and loading them; lm_eval is optional."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_longrope.errors import LongRopeError
from megatron_longrope.ranks import rank


@dataclass(frozen=True)
class TaskSpec:
    """One cell of a table: a task, or a group of tasks that lm-eval averages."""

    name: str
    """As `lm_eval ls tasks` lists it, or as a local YAML file calls itself."""
    num_fewshot: int | None = None
    """Solved examples before each question; None is the task's own choice."""
    metric: str | None = None
    """The number to report; None is acc_norm, acc or the first that the task has."""


PAPER_TASKS = (
    TaskSpec("arc_challenge", 25, "acc_norm"),
    TaskSpec("hellaswag", 10, "acc_norm"),
    TaskSpec("mmlu", 5, "acc"),
    TaskSpec("truthfulqa_mc2", 0, "acc"),
)
"""The board of the paper's table 8."""


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data."""

    spec: TaskSpec
    """As asked for, metric and few-shot examples filled in."""
    content: Any
    """What lm-eval's TaskManager loads: tasks and groups by name."""


def parse_tasks(text: str) -> tuple[TaskSpec, ...]:
    """Read `name[:few-shot[:metric]]`, separated by commas; `paper` is :data:`PAPER_TASKS`.

    A task of the paper without numbers gets the paper's.

    Raises:
        LongRopeError: An item is malformed or a task is named twice.
    """
    paper = {spec.name: spec for spec in PAPER_TASKS}
    found: list[TaskSpec] = []
    for item in filter(None, map(str.strip, text.split(","))):
        if item == "paper":
            found += PAPER_TASKS
            continue
        name, *rest = item.split(":")
        known = paper.get(name, TaskSpec(name))
        number = rest[0] if rest else ""
        if not name or len(rest) > 2 or (number and not number.isdecimal()):
            raise LongRopeError(
                f"task {item!r} is not NAME, NAME:FEWSHOT or NAME:FEWSHOT:METRIC, such as "
                "arc_challenge:25:acc_norm"
            )
        metric = rest[1] if len(rest) > 1 and rest[1] else known.metric
        found.append(TaskSpec(name, int(number) if number else known.num_fewshot, metric))
    names = [spec.name for spec in found]
    if not names:
        raise LongRopeError("no task is named; give `paper` or names such as arc_challenge:25")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LongRopeError(f"task {twice[0]} is named twice; name it once")
    return tuple(found)


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        LongRopeError: It, or something that it needs, is not installed.
    """
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise LongRopeError(
            f"tasks need lm-evaluation-harness ({error}); install it with "
            'pip install "megatron-longrope[eval]"'
        ) from None


def check_tasks(
    tasks: Sequence[TaskSpec],
    *,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    seed: int = 1234,
    allow_download: bool = False,
) -> list[LoadedTask]:
    """Find tasks and load their data, before any model is there.

    Args:
        tasks (Sequence[TaskSpec]): What to look for.
        include_path (str | Path, optional): Folder with more task YAML files, which come before
            lm-eval's of the same name.
        metadata (Mapping, optional): What tasks that make their own data are told, such as
            {"max_seq_lengths": "64k"}; lm-eval's `--metadata`.
        seed (int): Of what a task draws as it loads its data, whatever other tasks there are.
            Defaults to 1234, lm-eval's own.
        allow_download (bool): Let data be downloaded. Defaults to False: only local files and the
            Hugging Face cache are used, and the network is not asked.

    Raises:
        LongRopeError: lm-eval, a task, its data or its metric is missing, or the task insists on
            another number of few-shot examples.
    """
    require_lm_eval()
    if include_path is not None and not Path(include_path).is_dir():
        raise LongRopeError(f"{include_path} is no folder; give one that holds task YAML files")
    with downloads(allow_download), quiet_other_ranks():
        manager = _task_manager([spec.name for spec in tasks], include_path, metadata)
        return [_load(manager, spec, allow_download, seed) for spec in tasks]


def seed_libraries(seed: int) -> None:
    """Seed what tasks draw by, as lm-eval's simple_evaluate does before it loads them."""
    random.seed(0)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _task_manager(
    names: Sequence[str], include_path: str | Path | None, metadata: Mapping[str, Any] | None = None
) -> Any:
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        # lm-eval's own list is some 10,000 files: read it only for what is not at hand.
        local = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if all(_is_whole(local.task_index, name) for name in names):
            return local
    return TaskManager(include_path=folder, metadata=metadata)


def _is_whole(index: dict[str, Any], name: Any) -> bool:
    """Whether the index has a task, or a group and all that it consists of."""
    entry = index.get(name) if isinstance(name, str) else None
    if entry is None or entry.kind.name == "TAG":
        return False
    children = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    return all(_is_whole(index, child) for child in children)


def _load(manager: Any, spec: TaskSpec, allow_download: bool, seed: int) -> LoadedTask:
    entry = manager.task_index.get(spec.name)
    if entry is None:
        similar = difflib.get_close_matches(spec.name, manager.all_tasks, 3)
        raise LongRopeError(
            f"lm-eval knows no task {spec.name}"
            + (f" (similar: {', '.join(similar)})" if similar else "")
            + "; see `lm_eval ls tasks`, or give the folder of its YAML file as include path"
        )
    if entry.kind.name == "TAG":
        raise LongRopeError(
            f"{spec.name} is no task but a tag of several, which have no common score; name them: "
            + ", ".join(sorted(entry.tags))
        )
    seed_libraries(seed)
    try:
        content = manager.load([spec.name])
    except Exception as error:  # whatever data sets, YAML files and their functions raise
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        remedy = (
            "check the network and the task's files"
            if allow_download
            else "put its data into the Hugging Face cache, allow downloads, or give a local YAML "
            "file with data files as include path"
        )
        raise LongRopeError(f"task {spec.name} cannot be loaded: {reason}; {remedy}") from error
    for leaf in content["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise LongRopeError(
                f"task {leaf.task_name} runs code that the model writes, which is refused here; "
                "leave it out, or run it with lm_eval itself on the exported folder"
            )
    return LoadedTask(_completed(spec, content), content)


def _completed(spec: TaskSpec, content: Any) -> TaskSpec:
    """Apply the number of few-shot examples and choose the metric."""
    tasks, group = content["tasks"].values(), content["groups"].get(spec.name)
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own == 0 and spec.num_fewshot:
            raise LongRopeError(
                f"task {task.task_name} allows no few-shot examples besides those in its prompt, "
                f"but {spec.num_fewshot} are wanted; ask for {spec.name}:0"
            )
        wanted = (own or 0) if spec.num_fewshot is None else spec.num_fewshot
        task.set_config(key="num_fewshot", value=wanted)
    counts = {task.get_config("num_fewshot") for task in tasks}
    metrics = (
        [item.metric for item in group.aggregate_metric_list or ()]
        if group is not None
        else list(next(iter(tasks)).aggregation())
    )
    if not metrics:
        raise LongRopeError(
            f"group {spec.name} has no score of its own; name its tasks: "
            + ", ".join(group.child_names)
        )
    usual = [name for name in ("acc_norm", "acc") if name in metrics]
    metric = spec.metric or (*usual, *metrics)[0]
    if metric not in metrics:
        raise LongRopeError(
            f"task {spec.name} has no metric {metric}; choose one of {', '.join(metrics)}"
        )
    return replace(spec, metric=metric, num_fewshot=counts.pop() if len(counts) == 1 else None)


@contextlib.contextmanager
def downloads(allowed: bool) -> Iterator[None]:
    """Keep Hugging Face's libraries off the network, whenever they were imported."""
    if allowed:
        yield
        return
    import datasets
    import huggingface_hub

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # for processes that are started meanwhile
    # Not patch.dict, which would take back what others write into the environment meanwhile.
    before = {name: os.environ[name] for name in names if name in os.environ}
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.multiple(datasets.config, HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True),
    ):
        try:
            os.environ.update(dict.fromkeys(names, "1"))
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)
            os.environ.update(before)


def quiet_other_ranks() -> contextlib.AbstractContextManager:
    """lm-eval shows its bars on every process that it takes for a first one, as it does each."""
    if rank() == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())
