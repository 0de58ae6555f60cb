"""`longrope recipe`: run a recipe file, see how far it is, and what it will cost."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `recipe` with its three subcommands."""
    recipe = commands.add_parser(
        "recipe",
        help="run a whole extension from one file: search, fine-tune, evaluate, convert",
        description="Run the stages of a recipe file (docs/recipes.md).",
    )
    actions = recipe.add_subparsers(dest="recipe_command", required=True, metavar="ACTION")
    _add_run(actions)
    _add_status(actions)
    _add_plan(actions)


def run(args: argparse.Namespace) -> int | None:
    """Run the subcommand that was parsed."""
    from megatron_longrope.recipe.document import Recipe

    profiles = [name for names in args.profile for name in names.split(",") if name]
    recipe = Recipe.load(args.recipe, profiles, dict(args.set), args.output)
    actions = {"run": _run, "status": _status, "plan": _plan}
    return actions[args.recipe_command](recipe, args)


def _add(actions: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=description)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe file")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of everything that is written (default: the file's)"
    )
    parser.add_argument(
        "--profile", action="append", default=[], metavar="P",
        help="put a profile of the file over its values; several: a,b, the last wins",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
        help="put a value over the file's and the profiles'; may be given several times",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_run(actions: Any) -> None:
    parser = _add(
        actions,
        "run",
        "run what is not done",
        "Run what is not done. Interrupted or killed, the same command goes on. Exit codes: 0 all "
        "done, 1 a stage failed, 128 + N stopped by signal N.",
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print every command, and what would be done and why; start nothing",
    )  # fmt: skip
    parser.add_argument("--until", metavar="STAGE", help="only this stage and what it needs")
    parser.add_argument(
        "--again", metavar="STAGE", help="run it and what reads it, even if nothing changed"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="stages that run at once where they are independent (default: 1)",
    )  # fmt: skip


def _add_status(actions: Any) -> None:
    parser = _add(
        actions,
        "status",
        "where every stage stands",
        "Where every stage stands, also while a run is under way; starts nothing.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(actions: Any) -> None:
    parser = _add(
        actions,
        "plan",
        "GPU memory, FLOPs and hours of trainings and searches",
        "What the trainings and searches of a recipe will cost, by arithmetic alone. The hardware "
        "comes from the file's `plan`, or from the flags.",
    )
    parser.add_argument("--gpu", metavar="NAME", help="a100-80, h100, ... or TFLOPS:GIB")
    parser.add_argument("--gpus", type=int, metavar="G", help="GPUs of a job")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU")


def _run(recipe: Any, args: argparse.Namespace) -> int | None:
    from megatron_longrope.recipe.runner import run_recipe, show_commands

    if args.dry_run:
        return show_commands(recipe, until=args.until, again=args.again)
    return run_recipe(recipe, until=args.until, again=args.again, jobs=args.jobs)


def _status(recipe: Any, args: argparse.Namespace) -> None:
    from megatron_longrope.recipe.status import read_status

    status = read_status(recipe)
    if args.json:
        print(json.dumps(status.to_dict(), indent=2))
        return
    if recipe.about:
        print(f"{recipe.about}\n")
    print(status.text())


def _plan(recipe: Any, args: argparse.Namespace) -> None:
    from megatron_longrope.recipe.planning import Hardware, plan_table

    print(plan_table(recipe, Hardware.from_recipe(recipe, args.gpu, args.gpus, args.memory)))


def _setting(text: str) -> tuple[str, str]:
    """argparse type of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
