"""Imports point down, and nothing imports itself in a circle; `LAYERS` is the order.

Imports inside of functions count, those under TYPE_CHECKING do not.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import megatron_longrope

ROOT = Path(megatron_longrope.__file__).parent

# From the top down; what stands on one line are neighbours, which do not know each other. Modules
# beside the packages that are not listed here are the ground floor.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("api",),
    ("report",),
    ("factor_search", "evaluation"),
    ("conversion", "plan"),
    ("data", "checkup"),
    ("engine",),
    ("integration",),
    ("checkpoint",),
    ("rotary", "attention", "training_loss"),
)
GROUND = len(LAYERS)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    """Every module by its dotted name without the package's."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


NAMES = dict(modules())


def imports(path):
    """Names of the package's modules that a module imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in types_only:
            top, _, module = (node.module or "").partition(".")
            for name in node.names if top == "megatron_longrope" else ():
                inner = f"{module}.{name.name}".strip(".")
                yield inner if inner in NAMES else module


GRAPH = {name: set(imports(path)) - {name} for name, path in NAMES.items()}


def test_no_module_imports_itself_in_a_circle():
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_imports_point_down():
    climbs = []
    for name in GRAPH:
        package = name.partition(".")[0]
        level = LEVEL.get(package, GROUND)
        for other in GRAPH[name]:
            target = other.partition(".")[0]
            below = LEVEL.get(target, GROUND)
            # The package's root has the version, and names that are imported at first use.
            if target not in ("", package) and below <= level and not below == level == GROUND:
                climbs.append(f"{name} imports {other}")
    assert not climbs
