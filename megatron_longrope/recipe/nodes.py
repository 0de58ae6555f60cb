"""YAML with line numbers: what a place of the file holds, or one error that names the place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_longrope.recipe.values import Text, Value


@dataclass(frozen=True)
class Node:
    """A place in a YAML file."""

    file: Path
    """The file."""

    key: str
    """Keys that lead here, joined by dots."""

    yaml: yaml.Node
    """PyYAML's node."""

    line: int
    """Line number, from 1: the key's, where there is one."""

    @property
    def where(self) -> str:
        """`file:line: key`."""
        return f"{self.file}:{self.line}: {self.key}" if self.key else f"{self.file}:{self.line}"

    @property
    def is_mapping(self) -> bool:
        """Whether it has keys."""
        return isinstance(self.yaml, yaml.MappingNode)

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands behind the key."""
        return isinstance(self.yaml, yaml.ScalarNode) and not self.yaml.value

    def error(self, message: str) -> ValueError:
        """The error about this place."""
        return ValueError(f"{self.where}: {message}")

    def text(self) -> Text:
        """The scalar as text.

        Raises:
            ValueError: It is a list or a mapping.
        """
        if not isinstance(self.yaml, yaml.ScalarNode):
            raise self.error(f"is {self._kind()} where one text is due; write a single value")
        return Text(self.yaml.value, self.where)

    def texts(self) -> tuple[Text, ...]:
        """The items of a list of texts.

        Raises:
            ValueError: It is something else.
        """
        return tuple(node.text() for node in self.entries())

    def value(self) -> Value:
        """One text, or a list of texts."""
        return self.texts() if isinstance(self.yaml, yaml.SequenceNode) else self.text()

    def entries(self) -> list[Node]:
        """The items of a list.

        Raises:
            ValueError: It is no list.
        """
        if not isinstance(self.yaml, yaml.SequenceNode):
            raise self.error(
                f"is {self._kind()} where a list is due; put each item on a line of its own after -"
            )
        return [Node(self.file, self.key, item, _line(item)) for item in self.yaml.value]

    def items(self) -> dict[str, Node]:
        """Keys and what they hold, in the order of the file.

        Raises:
            ValueError: It is no mapping, or a key stands twice.
        """
        if not self.is_mapping:
            raise self.error(f"is {self._kind()} where keys are due; write lines of key: value")
        found: dict[str, Node] = {}
        for key, value in self.yaml.value:
            name = Node(self.file, self.key, key, _line(key)).text().text
            path = f"{self.key}.{name}" if self.key else name
            if name in found:
                raise Node(self.file, path, key, _line(key)).error(
                    f"stands twice, first on line {found[name].line}; keep one"
                )
            found[name] = Node(self.file, path, value, _line(key))
        return found

    def mapping(self, required: Sequence[str], optional: Sequence[str]) -> dict[str, Node]:
        """Keys among those allowed, and what they hold.

        Raises:
            ValueError: A key is unknown or missing.
        """
        found = self.items()
        allowed = dict.fromkeys((*required, *optional))
        for name, node in found.items():
            if name not in allowed:
                raise node.error(f"the key {name} is not known here; use {', '.join(allowed)}")
        for name in required:
            if name not in found:
                raise self.error(f"has no {name}; add it")
        return found

    def _kind(self) -> str:
        if isinstance(self.yaml, yaml.ScalarNode):
            return "empty" if self.is_empty else f"the text {self.yaml.value!r}"
        return "a mapping" if self.is_mapping else "a list"


def read_yaml(path: Path) -> Node:
    """The root of a YAML file.

    Raises:
        ValueError: The file cannot be read, is empty or no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the path") from None
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{place}: is no YAML ({reason}); correct the line") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if root is None:
        raise ValueError(f"{path}: is empty; a recipe has recipe: 1 and stages")
    return Node(path, "", root, _line(root))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
