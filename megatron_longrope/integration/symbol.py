"""Names inside Megatron that the plugin relies on, and whether they are as it expects.

`longrope doctor` compares them with the Megatron that is installed.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import EllipsisType

from megatron_longrope.errors import LongRopeError

TESTED_RELEASES = ("0.17", "0.18", "0.19")


def megatron_version() -> str:
    """Version of the megatron-core that is imported, or `not installed`."""
    try:
        version = importlib.import_module("megatron.core").__version__
    except ModuleNotFoundError:
        return "not installed"
    # From 0.18 on it names the commit of whatever git repository the package lies in.
    return version.partition("+")[0]


@dataclass(frozen=True)
class Symbol:
    """A name inside a Megatron module that the plugin replaces or stands in for."""

    module: str
    """Dotted module path."""
    name: str
    """Attribute of the module, or `Class.attribute`."""
    parameters: tuple[str | EllipsisType, ...] = (...,)
    """Parameters that the plugin relies on, in their order. A last `...` stands for any others,
    which the plugin passes on as they are; without it there should be none."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> tuple[object, str]:
        """The object that holds the attribute, and the attribute's name.

        Raises:
            LongRopeError: This Megatron has no such symbol.
        """
        try:
            holder: object = importlib.import_module(self.module)
            *path, attribute = self.name.split(".")
            for part in path:
                holder = getattr(holder, part)
            getattr(holder, attribute)
        except (ImportError, AttributeError) as error:
            raise LongRopeError(
                f"{self} is missing from megatron-core {megatron_version()}; the plugin is tested "
                f"with {', '.join(TESTED_RELEASES)}: install one of these or report the release"
            ) from error
        return holder, attribute

    def misfit(self) -> str | None:
        """What no longer fits about the parameters, or None.

        Raises:
            LongRopeError: This Megatron has no such symbol.
        """
        theirs = self._theirs()
        missing = [name for name in self._ours if name not in theirs]
        if missing:
            return f"has no parameter {_quoted(missing)} any more"
        common = [name for name in theirs if name in self._ours]
        if common != self._ours:
            return f"takes {_quoted(common)} in another order"
        required = [
            name
            for name, item in theirs.items()
            if name not in self._ours and item.default is inspect.Parameter.empty
        ]
        if required and ... not in self.parameters:
            return f"requires {_quoted(required)}, which the plugin does not know"
        return None

    @property
    def _ours(self) -> list[str]:
        return [name for name in self.parameters if name is not ...]

    def _theirs(self) -> dict[str, inspect.Parameter]:
        """Named parameters; a hooked function answers with the original's."""
        holder, attribute = self.owner()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = inspect.signature(getattr(holder, attribute)).parameters
        return {name: item for name, item in found.items() if item.kind not in variadic}


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
