"""Make the flags of a command from a dataclass of options, and the options from its flags."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from megatron_longrope.options import argument_type


class Parser(argparse.ArgumentParser):
    """A parser that says what a mistyped command, flag or choice was probably meant to be."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all there is; what is left over is an error of the command that it was given to."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(self._words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with 2, usage, the message and a guess."""
        flags = list(self._option_string_actions)
        given = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        wrong = [word for word in given if not any(known.startswith(word) for known in flags)]
        guesses = [guess for word in wrong for guess in difflib.get_close_matches(word, flags, 1)]
        if choice := re.search(r"invalid choice: '(.*?)'", message):
            words = [word for action in self._actions for word in action.choices or ()]
            guesses += difflib.get_close_matches(choice[1], words, 1)
        super().error(message + (f"; did you mean {' and '.join(guesses)}?" if guesses else ""))


def add_command(
    commands: Any, name: str, options: type, run: Callable[[Any], int | None], **how: Any
) -> None:
    """Add a command.

    Args:
        commands: What `add_subparsers` returned.
        name (str): The command.
        options (type): A subclass of :class:`megatron_longrope.options.Options`; each of its fields
            is a flag.
        run (Callable): Gets the options, returns the exit code or None.
        how: Further keywords of `add_parser`, such as help and description.
    """
    parser = commands.add_parser(name, **how)
    add_flags(parser, options)
    parser.set_defaults(run=lambda args: run(read_flags(options, args)))


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for every field, in the group that its class names.

    Args:
        parser (argparse.ArgumentParser): Gets them.
        options (type): As in :func:`add_command`, with a docstring under each field.
    """
    by_name = {item.name: item for item in fields(options)}
    groups: dict[Any, Any] = {None: parser}
    exclusive: dict[str, Any] = {}
    for owner in reversed(options.__mro__):
        names = [name for name in inspect.get_annotations(owner) if name in by_name]
        if not names:
            continue
        if (heading := owner.GROUP) not in groups:
            words = (heading,) if isinstance(heading, str) else heading
            groups[heading] = parser.add_argument_group(*words)
        docs = _docs(owner.__module__)[owner.__name__]
        for name in names:
            how = {"help": docs.get(name), **by_name[name].metadata}
            group = groups[heading]
            if how.pop("hidden", False):
                continue
            if alternatives := how.pop("exclusive", None):
                required = how.pop("required", False)
                if alternatives not in exclusive:
                    exclusive[alternatives] = group.add_mutually_exclusive_group(required=required)
                group = exclusive[alternatives]
            _add(group, by_name[name], how)


def read_flags(options: type, args: argparse.Namespace) -> Any:
    """Return the options that a command was given."""
    names = [item.name for item in fields(options) if not item.metadata.get("hidden")]
    return options(**{name: getattr(args, name) for name in names})


def _add(group: Any, item: Field, how: dict[str, Any]) -> None:
    if how.get("type") not in (None, int, float):
        how["type"] = argument_type(how["type"])
    text = how["help"] or ""
    if type(item.default) in (int, float, str) and "(default" not in text:
        text = f"{text} (default: {item.default})".lstrip()
    how["help"] = text.replace("%", "%%") or None
    if how.pop("positional", False):
        group.add_argument(item.name, **how)
        return
    name = how.pop("name", f"--{item.name.replace('_', '-')}")
    if item.default is MISSING:
        how["required"] = True
    elif item.default is False:
        how["action"] = "store_true"
    else:
        # argparse appends to a list; the field of a frozen dataclass holds a tuple.
        how["default"] = list(item.default) if how.get("action") == "append" else item.default
    group.add_argument(name, dest=item.name, **how)


@functools.cache
def _docs(module: str) -> dict[str, dict[str, str]]:
    """Return for each class of a module the docstrings under its fields, each as one line."""
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {
        owner.name: {
            field.target.id: " ".join(below.value.value.split())
            for field, below in zip(owner.body, owner.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        }
        for owner in body
        if isinstance(owner, ast.ClassDef)
    }
