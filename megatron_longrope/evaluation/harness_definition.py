"""What a task's score depends on besides its documents and requests: the files that define it."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

# Not where the data lie, nor what is in the requests: those are hashed as they are.
_SCORING = (
    "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter",
    "generation_kwargs", "repeats", "process_results", "filter_list", "metric_list",
)  # fmt: skip


def definition(content: Any) -> bytes:
    """Return what decides scores, given the same answers; equal in every process.

    Of a function the whole file counts, as it may call others there.
    """
    groups = {
        name: [vars(item) for item in group.aggregate_metric_list or ()]
        for name, group in content["groups"].items()
    }
    tasks = {
        name: [[leaf.get_config(key) for key in _SCORING], _own_class(leaf)]
        for name, leaf in content["tasks"].items()
    }
    return json.dumps([groups, tasks], default=_in_words).encode()


def _own_class(task: Any) -> type | None:
    """Return the class of a task that is written in Python; of a plain one none."""
    return None if type(task).__module__.startswith("lm_eval.api.") else type(task)


def _in_words(value: Any) -> Any:
    """Return what JSON can hold of a function or another object, without its address."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    words = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    try:
        source = inspect.getsourcefile(value)
    except TypeError:  # neither a function nor a class
        return words
    return [value.__qualname__, Path(source).read_text("utf-8") if source else words]
