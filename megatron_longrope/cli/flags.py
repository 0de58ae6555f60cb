"""Make the flags of a command from a dataclass of options, and the options from its flags."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for every field, in a group for every class of the options.

    Args:
        parser (argparse.ArgumentParser): Gets them.
        options (type): A dataclass whose fields come from
            :func:`megatron_longrope.evaluation.options.flag`, with a docstring under each; it and
            each dataclass that it extends name their `GROUP`.
    """
    by_name = {item.name: item for item in fields(options)}
    for owner in reversed(options.__mro__):
        names = [name for name in inspect.get_annotations(owner) if name in by_name]
        if not names:
            continue
        group, docs = parser.add_argument_group(owner.GROUP), _docs(owner)
        for name in names:
            how = dict(by_name[name].metadata)
            if not how.pop("hidden", False):
                _add(group, by_name[name], {"help": docs.get(name), **how})


def read_flags(options: type, args: argparse.Namespace) -> Any:
    """Return the options that a command was given."""
    names = [item.name for item in fields(options) if not item.metadata.get("hidden")]
    return options(**{name: getattr(args, name) for name in names})


def _add(group: Any, item: Field, how: dict[str, Any]) -> None:
    if item.default is MISSING:
        how["required"] = True
    elif item.default is False:
        how["action"] = "store_true"
    else:
        # argparse appends to a list; the field of a frozen dataclass holds a tuple.
        how["default"] = list(item.default) if how.get("action") == "append" else item.default
    if how.get("type") not in (None, int, float):
        how["type"] = _argument_type(how["type"])
    group.add_argument(f"--{item.name.replace('_', '-')}", **how)


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type whose ValueError argparse shows as it is."""

    def argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


def _docs(owner: type) -> dict[str, str]:
    """Return the docstrings under the fields of a class, each as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
