"""A folder with a recipe file and a small program, and runs that a test may kill."""

import json
import os
import signal
import time

from megatron_longrope.recipe.document import Recipe
from megatron_longrope.recipe.runner import run_recipe

TOOL = """
import pathlib, sys, time
action, target, *rest = sys.argv[1:]
target = pathlib.Path(target)
if action == "append":      # every run of it shows
    with target.open("a") as file:
        file.write(rest[0])
elif action == "upper":
    target.write_text(pathlib.Path(rest[0]).read_text().upper())
elif action == "save":      # as Megatron saves
    folder = target / f"iter_{int(rest[0]):07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(rest[1])
    (target / "latest_checkpointed_iteration.txt").write_text(rest[0])
elif action == "unless":    # fails until the file exists
    with target.open("a") as file:
        file.write("z")
    print("what went wrong")
    sys.exit(0 if pathlib.Path(rest[0]).exists() else 3)
elif action == "interval":  # when it began and ended
    began = time.time()
    time.sleep(float(rest[0]))
    target.write_text(f"{began} {time.time()}")
"""


class Workshop:
    """Writes recipes and loads them."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "out put"  # a space, because people have them
        self.path = folder / "recipe.yaml"
        (folder / "tool.py").write_text(TOOL)

    def write(self, stages, **sections):
        """JSON is YAML."""
        self.path.write_text(json.dumps({"recipe": 1, "stages": stages, **sections}))

    def load(self, stages=None, *, profiles=(), overrides=None, **sections):
        if stages is not None:
            self.write(stages, **sections)
        return Recipe.load(self.path, profiles, overrides, self.output)

    def text(self, name):
        return (self.output / name).read_text()


def tool(*words, **more):
    """The keys of a stage or a command that runs the small program."""
    return {"run": "python ${recipe}/tool.py", "args": list(words), **more}


def chain(text="x"):
    """Two stages: the second reads what the first writes."""
    return {
        "two": tool(
            "upper ${output}/second ${output}/first",
            reads=["${output}/first"],
            writes=["${output}/second"],
        ),
        "one": tool(f"append ${{output}}/first {text}", writes=["${output}/first"]),
    }


def in_a_process(recipe, **options):
    """Run a recipe in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    # Tests may themselves have been started so that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os._exit(run_recipe(recipe, **options))
    except BaseException as error:
        print(f"{error!r}", flush=True)
        os._exit(99)


def exit_code(pid):
    """Wait for a forked process; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition, seconds=60):
    """Until the condition holds; a busy machine takes its time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
