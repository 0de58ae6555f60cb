"""`${name}` in a recipe: texts, flags and blocks of flags with their names put in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_DOLLAR = re.compile(rf"\$(?:(?P<dollar>\$)|\{{(?P<name>{_NAME})\}})?")
_ALONE = re.compile(rf"\$\{{({_NAME})\}}")


def is_name(text: str) -> bool:
    """Whether a value may be called so."""
    return re.fullmatch(_NAME, text) is not None


@dataclass(frozen=True)
class Text:
    """A text of the recipe file, which knows where it stands."""

    text: str
    """As written."""

    where: str
    """`file:line: key`, for messages."""

    def error(self, message: str) -> ValueError:
        """The error about this text."""
        return ValueError(f"{self.where}: {message}")


Value = Text | tuple[Text, ...]


class Names:
    """What may stand in `${...}`.

    Args:
        values (Mapping[str, Value]): May use one another.
        fixed (Mapping[str, str | Sequence[str]]): Put in as they are; a sequence is spliced in
            where a word is exactly `${name}`.
    """

    def __init__(
        self, values: Mapping[str, Value], fixed: Mapping[str, str | Sequence[str]]
    ) -> None:
        self._values, self._fixed = values, fixed

    def having(self, **fixed: str | Sequence[str]) -> Names:
        """The same names, with some more or other fixed ones."""
        return Names(self._values, {**self._fixed, **fixed})

    def movable(self) -> Names:
        """Names under which a text does not say where the output and the recipe lie."""
        return self.having(output="${output}", recipe="${recipe}")

    def check(self) -> None:
        """Put names into every value, used or not.

        Raises:
            ValueError: A value uses an unknown name, or itself.
        """
        for value in self._values.values():
            self.texts(value if isinstance(value, tuple) else (value,))

    def text(self, item: Text) -> str:
        """A text with its names put in.

        Raises:
            ValueError: A name is unknown, stands for a list or uses itself.
        """
        return self._text(item, item.text, ())

    def texts(self, items: Sequence[Text]) -> tuple[str, ...]:
        """Texts, each whole; `${block}` alone is its items, and what ends up empty is left out."""
        found = (self._text(item, item.text, used) for item, used in self._expanded(items, ()))
        return tuple(text for text in found if text)

    def words(self, items: Sequence[Text]) -> tuple[str, ...]:
        """The words of a command line.

        Every item is split as a shell does before names are put in, so that values may hold spaces.
        A word that consists of names alone and ends up empty is left out.

        Raises:
            ValueError: As :meth:`text`, or a quotation is not closed.
        """
        words: list[str] = []
        for item, used in self._expanded(items, ()):
            try:
                parts = shlex.split(item.text)
            except ValueError:
                raise item.error(
                    f"a quotation in {item.text!r} is not closed; close it, or write "
                    "\\' for an apostrophe"
                ) from None
            for part in parts:
                alone = _ALONE.fullmatch(part)
                fixed = self._fixed.get(alone[1]) if alone else None
                if fixed is not None and not isinstance(fixed, str):
                    words.extend(fixed)
                    continue
                word = self._text(item, part, used)
                if word or not part:
                    words.append(word)
        return tuple(words)

    def _expanded(self, items: Sequence[Text], used: tuple[str, ...]):
        """Items in place of the blocks that hold them, with the names that led to each."""
        for item in items:
            alone = _ALONE.fullmatch(item.text.strip())
            value = self._values.get(alone[1]) if alone else None
            if alone and isinstance(value, tuple) and alone[1] not in self._fixed:
                self._refuse_cycle(item, alone[1], used)
                yield from self._expanded(value, (*used, alone[1]))
            else:
                yield item, used

    def _text(self, item: Text, text: str, used: tuple[str, ...]) -> str:
        def put_in(match: re.Match[str]) -> str:
            if match["dollar"]:
                return "$"
            if match["name"] is None:
                raise item.error(
                    f"a $ in {text!r} begins no name; write ${{name}}, or $$ for a dollar sign"
                )
            return self._named(item, match["name"], used)

        return _DOLLAR.sub(put_in, text)

    def _named(self, item: Text, name: str, used: tuple[str, ...]) -> str:
        if name in self._fixed:
            fixed = self._fixed[name]
            return fixed if isinstance(fixed, str) else shlex.join(fixed)
        if name not in self._values:
            known = ", ".join(sorted({*self._fixed, *self._values}))
            raise item.error(
                f"${{{name}}} is not known; put it under values, or use one of {known}"
            )
        self._refuse_cycle(item, name, used)
        value = self._values[name]
        if isinstance(value, tuple):
            raise item.error(
                f"${{{name}}} is a list, which cannot stand in a text; make it an item of its own"
            )
        return self._text(value, value.text, (*used, name))

    def _refuse_cycle(self, item: Text, name: str, used: tuple[str, ...]) -> None:
        if name in used:
            circle = " -> ".join((*used[used.index(name) :], name))
            raise item.error(f"the value {name} uses itself ({circle}); break the circle")
