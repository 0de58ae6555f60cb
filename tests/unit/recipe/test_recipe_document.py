import sys

import pytest
from recipes import chain, tool

from megatron_longrope.recipe.commands import display
from megatron_longrope.recipe.document import Recipe

PYTHON = sys.executable
COMPLETE = """\
recipe: 1
about: Everything that a recipe can have.
output: runs/x
plan: {gpu: h100, gpus: 8}
values:
  base: checkpoints/my base
  cp: 8
  cpu: ""
  model:
    - --num-layers 32       # each with a comment
    - --hidden-size ${width}
  width: 4096
profiles:
  rehearsal:
    base: tiny
    model:
      - --num-layers 2
  cpu: {cpu: --cpu, extra: new}
launch:
  torchrun: torchrun --nproc-per-node ${cp} ${module}
  slurm:
    submit: sbatch --parsable job.sbatch ${command}
    alive: squeue --noheader --jobs ${job}
    grace: 5
stages:
  train:
    about: Trains on ${cp} GPUs.
    launch: torchrun
    run: longrope pretrain ${recipe}/script.py
    args:
      - ${model}
      - --load ${base} --lr 1e-5 --fine yes --at 12:30:00
      - ${cpu}
    how:
      - --context-parallel-size ${cp}
    reads:
      - ${base}
      - ${output}/data/train.bin
    writes:
      - ${output}/trained
    environment: {A: 1}
    show: ^iteration .*$
    minutes: 35
    retries: 2
  data:
    launch: slurm
    commands:
      - run: longrope data prepare
        args:
          - --output ${output}/data/train
      - run: some-program
        launch: process
    writes:
      - ${output}/data
"""


@pytest.fixture
def load(tmp_path):
    def load(text=COMPLETE, *arguments, **options):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return Recipe.load(path, *arguments, **options)

    return load


def test_a_complete_recipe_is_read(load, tmp_path):
    recipe = load()
    assert recipe.about.startswith("Everything") and str(recipe.output) == "runs/x"
    assert recipe.plan == {"gpu": "h100", "gpus": "8"}
    assert [stage.name for stage in recipe.stages] == ["data", "train"]
    train = recipe.named("train")
    assert train.about == "Trains on 8 GPUs."
    assert train.reads == {
        "checkpoints/my base": "checkpoints/my base",
        "runs/x/data/train.bin": "${output}/data/train.bin",
    }
    assert train.writes == ("runs/x/trained",)
    assert train.environment == {"A": "1"} and train.show.search("iteration 5")
    assert (train.minutes, train.retries, train.line) == (35.0, 2, 26)
    (command,) = train.commands
    script = f"{tmp_path}/script.py"
    assert command.argv == (
        PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "8", "-m", "megatron_longrope",
        "pretrain", script, "--num-layers", "32", "--hidden-size", "4096", "--load",
        "checkpoints/my base", "--lr", "1e-5", "--fine", "yes", "--at", "12:30:00",
        "--context-parallel-size", "8",
    )  # fmt: skip
    assert command.words[:3] == ("longrope", "pretrain", script)
    assert display(command.argv).startswith("torchrun --nproc-per-node 8 -m megatron_longrope")


def test_how_is_no_part_of_what_is_computed_and_neither_are_places(load):
    computed = load().named("train").commands[0].computed
    assert "--context-parallel-size" not in computed
    assert computed[2] == "${recipe}/script.py"
    moved = load(output="elsewhere").named("data").commands[0]
    assert moved.words[-1] == "elsewhere/data/train"
    assert moved.computed == load().named("data").commands[0].computed


def test_a_launcher_may_submit_a_job_and_a_command_may_have_its_own(load):
    submitted, plain = load().named("data").commands
    assert submitted.argv[:6] == (
        "sbatch", "--parsable", "job.sbatch", PYTHON, "-m", "megatron_longrope",
    )  # fmt: skip
    assert submitted.alive == ("squeue", "--noheader", "--jobs", "${job}")
    assert submitted.grace == 5.0
    assert plain.argv == ("some-program",) and plain.alive is None


def test_profiles_and_settings_are_put_over_values_the_last_on_top(load):
    words = load(COMPLETE, ["rehearsal", "cpu"], {"cp": "2"}).named("train").commands[0].words
    assert words[3:7] == ("--num-layers", "2", "--load", "tiny")
    assert words[-3:] == ("--cpu", "--context-parallel-size", "2")


def test_a_list_is_set_by_one_line_of_flags(load):
    words = load(COMPLETE, overrides={"model": "--num-layers 4 --x"}).named("train").commands[0]
    assert words.words[3:6] == ("--num-layers", "4", "--x")


def test_the_module_of_a_python_script_is_the_script(load):
    text = COMPLETE.replace("run: longrope pretrain ${recipe}/script.py", "run: python a.py")
    argv = load(text).named("train").commands[0].argv
    assert argv[4:7] == ("8", "a.py", "--num-layers")


def test_a_command_within_a_word_is_quoted_for_a_shell(workshop):
    recipe = workshop.load(
        {"a": {"run": "echo 'a b'", "launch": "far"}}, launch={"far": "ssh host 'nice ${command}'"}
    )
    assert recipe.stages[0].commands[0].argv == ("ssh", "host", "nice echo 'a b'")


def test_a_recipe_extends_another_by_name(load, tmp_path):
    (tmp_path / "base.yaml").write_text(COMPLETE)
    recipe = load(
        """\
recipe: 1
extends: base.yaml
output: runs/mine
values:
  base: other
profiles:
  rehearsal: {width: 3}
stages:
  data: ""
  last:
    run: echo
    reads:
      - ${output}/trained
"""
    )
    assert [stage.name for stage in recipe.stages] == ["train", "last"]
    assert str(recipe.output) == "runs/mine" and recipe.about.startswith("Everything")
    assert "other" in recipe.named("train").reads
    both = Recipe.load(recipe.path, ["rehearsal"])
    assert both.named("train").commands[0].words[3:7] == ("--num-layers", "2", "--load", "tiny")


def test_only_what_a_stage_needs_is_selected(workshop):
    recipe = workshop.load({**chain(), "other": {"run": "echo"}})
    assert [stage.name for stage in recipe.until("two")] == ["one", "two"]
    assert [stage.name for stage in recipe.until(None)] == ["one", "two", "other"]


def test_stages_keep_their_order_where_nothing_else_decides(workshop):
    stages = {name: tool(f"append ${{output}}/{name} x") for name in ("c", "a", "b")}
    assert [stage.name for stage in workshop.load(stages).stages] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("read", "write"),
    [("data", "data"), ("data/train.bin", "data"), ("data", "data/train"), ("./data", "x/../data")],
)
def test_a_stage_follows_those_that_write_what_it_reads_around_it_or_inside_it(
    workshop, read, write
):
    recipe = workshop.load(
        {
            "reader": {"run": "echo", "reads": [f"${{output}}/{read}"]},
            "writer": {"run": "echo", "writes": [f"${{output}}/{write}"]},
        }
    )
    assert [stage.name for stage in recipe.stages] == ["writer", "reader"]
    assert recipe.needs["reader"] == {"writer"}


def broken(old, new):
    assert COMPLETE.count(old) >= 1
    return COMPLETE.replace(old, new, 1)


TRAINED, DATA = "      - ${output}/trained\n", "      - ${output}/data\n"


@pytest.mark.parametrize(
    ("text", "there", "message"),
    [
        (broken("recipe: 1", "recipe: 2"), "recipe: 2", "format '2' is not known; this version"),
        (broken("recipe: 1\n", ""), "about:", "has no recipe; add it"),
        (broken("about:", "abuot:"), "abuot", "abuot: the key abuot is not known here; use recipe"),
        (broken("  cp: 8", "  cp: 8\n  cp: 4"), "cp: 4", "values.cp: stands twice, .* line 7"),
        (broken("  cp: 8", "  cp:\n    - [1]"), "- [1]", "values.cp: is a list where one text"),
        (broken("  cp: 8", "  c-p: 8"), "c-p", "a value cannot be called 'c-p'"),
        (broken("  cp: 8", "  job: 8"), "job: 8", "job has a meaning of its own"),
        (broken("width: 4096", "width: a ${width}"), "width: a", "the value width uses itself"),
        (broken("width: 4096", "width: a ${model}"), "width: a", "is a list, which cannot stand"),
        (broken("launch: torchrun", "launch: fast"), "launch: fast",
         "launch fast is not known; choose among process, torchrun, slurm"),
        (broken("    run: longrope pretrain ${recipe}/script.py\n", ""), "  train:",
         "neither run nor commands"),
        (broken("longrope pretrain", "megatron pretrain"), "run: megatron",
         "launch torchrun starts a Python module, and megatron is none"),
        (broken("- --load ${base}", "- --load ${bas}"), "${bas}", r"train.args: \$\{bas\} is not"),
        (broken("- ${model}\n", "- ${model} '\n"), "${model} '", "a quotation in .* is not closed"),
        (broken("    show:", "    shows:"), "shows:", "stages.train.shows: the key shows"),
        (broken("args:\n      - ${model}\n", "args: ${model}\n    x:\n"), "    x:", "the key x"),
        (broken("args:\n          - --output ${output}/data/train", "args: --output x"),
         "args: --output x", "is the text '--output x' where a list is due"),
        (broken(TRAINED, "      - /etc/passwd\n"), "    writes:", "does not lie under"),
        (broken(TRAINED, "      - ${output}\n"), "    writes:", "does not lie under"),
        (broken(TRAINED, "      - ${output}/logs/x\n"), "    writes:", "the recipe's own records"),
        (broken(TRAINED, "      - ${output}/data/x\n"), "  data:", "and so does stage train"),
        (broken("^iteration .*$", "'(['"), "show:", r"'\(\[' is no regular expression"),
        (broken("minutes: 35", "minutes: soon"), "minutes:", "'soon' is not a number of at least"),
        (broken("retries: 2", "retries: 1.5"), "retries:", "'1.5' is not a whole number"),
        (broken("  train:\n", "  ../x:\n"), "  ../x:", "a stage cannot be called '../x'"),
        (broken("    launch: slurm\n", "    launch: slurm\n    run: echo\n"), "run: echo",
         "stages.data.run: stands beside commands"),
        (broken("alive: squeue --noheader --jobs ${job}", "job: 5"), "job: 5", "the key job"),
        (broken("    alive: squeue --noheader --jobs ${job}\n", ""), "  slurm:", "has no alive"),
        (broken(DATA, DATA + "    reads:\n      - ${output}/trained\n"), "  train:",
         r"in a circle \(data reads from train reads from data\)"),
        (broken(DATA, DATA + "    reads:\n      - ${output}/data/x\n"), "  train:",
         "data reads what it writes itself"),
        (broken("environment: {A: 1}", "environment: 1"), "environment:", "where keys are due"),
        (broken("      - ${base}\n", "      - a: b\n"), "- a: b", "is a mapping where one text"),
        (broken("plan: {gpu: h100", "plan: {gpx: h100"), "plan:", "plan.gpx: the key gpx"),
        (broken("    minutes: 35", "\tminutes: 35"), "\tminutes", "is no YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_in_one_sentence_with_its_line(load, tmp_path, text, there, message):
    line = text[: text.index(there)].count("\n") + 1
    with pytest.raises(ValueError, match=message) as refused:
        load(text)
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"{tmp_path}/recipe.yaml:{line}: "), said


def test_a_file_that_is_missing_or_empty_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read"):
        Recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="is empty"):
        load("")
    with pytest.raises(ValueError, match="has no stages"):
        load("recipe: 1\noutput: x\n")
    with pytest.raises(ValueError, match="says no output folder"):
        load("recipe: 1\nstages: {a: {run: echo}}\n")


def test_names_on_the_command_line_must_exist(load):
    with pytest.raises(ValueError, match="there is no profile fast; the recipe has rehearsal, cpu"):
        load(COMPLETE, ["fast"])
    with pytest.raises(ValueError, match=r"--set bas: there is no such value"):
        load(COMPLETE, overrides={"bas": "x"})
    with pytest.raises(ValueError, match=r"^--set base: \$\{x\} is not known"):
        load(COMPLETE, overrides={"base": "${x}"})
    with pytest.raises(ValueError, match="has no stage tain; its stages are data, train"):
        load().until("tain")


def test_files_that_extend_each_other_are_refused(load, tmp_path):
    (tmp_path / "other.yaml").write_text("recipe: 1\nextends: recipe.yaml\n")
    with pytest.raises(ValueError, match=r"other\.yaml:2: extends: .* extends itself"):
        load("recipe: 1\nextends: other.yaml\n")
