"""Write the patch of one Megatron release: the wrappers of hooks.py, bound in Megatron's source.

    python patches/make.py                        for the installed megatron-core
    python patches/make.py /path/to/Megatron-LM   for a checkout of a release tag

Which symbols are bound is read from hooks.py, so that a patch holds what the hooks would replace.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

IMPORT = "from megatron_longrope.integration import wrappers as longrope"
WIDTH = 100  # of Megatron's lines
CONTEXT = 3  # lines around an addition: `def core_attention` alone would fit two places


def main() -> None:
    """Write `megatron-lm-RELEASE.patch` beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tree",
        nargs="?",
        help="Megatron-LM checkout without the patch; default: the installed megatron-core",
    )
    tree = parser.parse_args().tree
    if tree:
        sys.path.insert(0, str(Path(tree).resolve()))
    text = patch()
    path = Path(__file__).with_name(f"megatron-lm-{release()}.patch")
    path.write_text(text)
    print(f"wrote {path}")


def release() -> str:
    """First two numbers of the version of the Megatron that is imported."""
    from megatron_longrope.integration import compat

    return ".".join(compat.megatron_version().split(".")[:2])


def patch() -> str:
    """The patch for the Megatron that is imported."""
    from megatron_longrope.integration import hooks

    wrappers: dict[str, dict[str, str]] = {}
    for symbol, wrapper in [*hooks.argument_wrappers(), *hooks.model_wrappers()]:
        wrappers.setdefault(symbol.module, {})[symbol.name] = wrapper.__name__
    text = f"LongRoPE in Megatron-LM {release()}; see patches/README.md of megatron-longrope.\n\n"
    return text + "".join(_file_patch(module, wrappers) for module in sorted(wrappers))


def _file_patch(module: str, wrappers: dict[str, dict[str, str]]) -> str:
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    if "megatron_longrope" in source:
        raise SystemExit(f"{module} is already patched; give a tree without the patch")
    added = insertions(source, module, wrappers)
    name = module.replace(".", "/") + ".py"
    header = f"diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n"
    return header + _hunks(source.splitlines(), added) if added else ""


def insertions(
    source: str, module: str, wrappers: dict[str, dict[str, str]]
) -> dict[int, list[str]]:
    """The lines that bind a module's wrappers, by the number of lines that come before them.

    A definition gets a decorator. An imported name is bound anew after the imports, unless the
    module that it comes from binds it already.

    Args:
        source (str): The module's text.
        module (str): Its dotted name.
        wrappers (dict[str, dict[str, str]]): By module and symbol, the name of the wrapper.

    Raises:
        ValueError: The module has a symbol not at all, or twice.
    """
    tree = ast.parse(source)
    added: dict[int, list[str]] = {}
    rebound: list[str] = []
    imported_before = len(source)
    for name, wrapper in wrappers[module].items():
        path = _definition(tree, name.split("."))
        if path:
            imported_before = min(imported_before, path[0].lineno)
            first = min(node.lineno for node in (path[-1], *path[-1].decorator_list))
            added[first - 1] = [f"{' ' * path[-1].col_offset}@longrope.{wrapper}"]
        elif name not in wrappers.get(_origin(tree, name, module), {}):
            rebound += _rebinding(name, wrapper)
    if added or rebound:
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        last = max(node.end_lineno for node in imports if node.lineno < imported_before)
        added[last] = [IMPORT, *([""] if rebound else []), *rebound]
    return added


def _hunks(lines: list[str], added: dict[int, list[str]]) -> str:
    """Hunks that only add; difflib would also move the blank lines between them."""
    groups: list[list[int]] = []
    for position in sorted(added):
        if groups and position - groups[-1][-1] <= 2 * CONTEXT:
            groups[-1].append(position)
        else:
            groups.append([position])
    text, shift = "", 0
    for group in groups:
        first, last = max(group[0] - CONTEXT, 0), min(group[-1] + CONTEXT, len(lines))
        body, at = [], first
        for position in group:
            body += [f" {line}" for line in lines[at:position]]
            body += [f"+{line}" for line in added[position]]
            at = position
        body += [f" {line}" for line in lines[at:last]]
        text += f"@@ -{first + 1},{last - first} +{first + 1 + shift},{len(body)} @@\n"
        text += "".join(f"{line}\n" for line in body)
        shift += len(body) - (last - first)
    return text


def _definition(tree: ast.AST, names: list[str]) -> list[ast.FunctionDef | ast.ClassDef]:
    """The nested definitions with these names, outermost first; empty when there is none."""
    path = []
    for name in names:
        kinds = ast.FunctionDef | ast.ClassDef
        found = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
        if not found:
            return []
        if len(found) > 1:
            raise ValueError(f"{name} is defined {len(found)} times")
        tree = found[0]
        path.append(tree)
    return path


def _origin(tree: ast.Module, name: str, module: str) -> str:
    """The module from which `name` is imported."""
    package = module.rpartition(".")[0]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and _provides(node.names, name):
            source = "." * node.level + (node.module or "")
            return importlib.util.resolve_name(source, package)
    raise ValueError(f"{module} neither defines nor imports {name}")


def _provides(aliases: Iterable[ast.alias], name: str) -> bool:
    return any(alias.name == "*" or (alias.asname or alias.name) == name for alias in aliases)


def _rebinding(name: str, wrapper: str) -> list[str]:
    line = f"{name} = longrope.{wrapper}({name})"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name} = longrope.{wrapper}(", f"    {name}", ")"]


if __name__ == "__main__":
    main()
