"""The recipes in examples/: their commands are those of the programs they call, and they walk."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_longrope.cli import build_parser
from megatron_longrope.integration.arguments import add_longrope_args
from megatron_longrope.recipe.document import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = ("llama2_7b", "mistral_7b", "llama3_8b")
PROFILES = ((), ("cma",), ("slurm",), ("rehearsal",))


def commands(name, profiles=()):
    """Every command of a recipe: the stage's name and its words behind `longrope`."""
    recipe = Recipe.load(ROOT / "examples" / name / "recipe.yaml", profiles)
    for stage in recipe.stages:
        for command in stage.commands:
            words = list(command.argv)
            yield stage.name, words[words.index("megatron_longrope") + 1 :]


@pytest.fixture(scope="module")
def megatron():
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_longrope_args(arguments.add_megatron_arguments(parser))


@pytest.mark.parametrize("profiles", PROFILES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_command_is_one_that_the_command_line_takes(name, profiles):
    for stage, words in commands(name, profiles):
        try:
            args = build_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{stage}: {' '.join(words)}")
        assert args.command == words[0]


@pytest.mark.parametrize("name", RECIPES)
def test_megatron_knows_every_flag_of_the_trainings(name, megatron):
    trainings = [words[2:] for _, words in commands(name) if words[0] == "pretrain"]
    assert trainings
    for words in trainings:
        args, unknown = megatron.parse_known_args(words)
        known_from_0_19 = {"--dataloader-inter-document-masking"}
        assert set(unknown) <= known_from_0_19
        assert args.longrope_config and args.longrope_chunked_loss
        assert args.position_embedding_type == "rope"


@pytest.mark.parametrize(
    "name, batch, rate, decay, steps, length",
    [
        # LongRoPE, section 4.1 and appendix A.2
        ("llama2_7b", 32, 2e-5, "linear", [400, 600], [131072, 262144]),
        ("mistral_7b", 64, 1e-6, "constant", [400], [16384]),
        # LongRoPE2, section 4.1: 10B tokens
        ("llama3_8b", 64, 2e-5, "cosine", [1192], [131072]),
    ],
)
def test_trainings_have_the_published_settings(name, batch, rate, decay, steps, length, megatron):
    trainings = [
        megatron.parse_known_args(words[2:])[0]
        for _, words in commands(name)
        if words[0] == "pretrain"
    ]
    assert [args.train_iters for args in trainings] == steps
    assert [args.seq_length for args in trainings] == length
    for args in trainings:
        assert args.global_batch_size == batch and args.lr == rate
        assert args.lr_decay_style == decay and args.lr_warmup_iters < args.train_iters
        assert args.weight_decay == 0 and args.clip_grad == 1.0


def test_searches_have_the_published_sizes():
    from megatron_longrope.cli.search import parameters

    searches = {
        stage: build_parser().parse_args(words)
        for stage, words in commands("llama2_7b")
        if words[0] == "search"
    }
    near, far = searches["search_tuned"], searches["search_farthest"]
    assert (near.target_length, far.target_length) == (1 << 18, 1 << 21)
    assert (near.num_samples, far.num_samples) == (5, 3)
    assert (parameters(near).population_size, parameters(far).population_size) == (64, 32)
    assert far.base_config.endswith("factors/256k.json")


def test_cma_is_a_profile_of_every_recipe():
    for name in RECIPES:
        for _, words in commands(name, ("cma",)):
            if words[0] == "search":
                assert build_parser().parse_args(words).algorithm == "cma"


def test_the_jobs_of_the_slurm_profile_run_the_modules_words_on_all_nodes():
    recipe = Recipe.load(ROOT / "examples/llama2_7b/recipe.yaml", ("slurm",))
    command = recipe.named("finetune_tuned").commands[0]
    submit = list(command.argv)
    script = next(word for word in submit if word.endswith("stage.sbatch"))
    assert Path(script).exists()
    assert submit[submit.index(script) + 1 :][:3] == ["-m", "megatron_longrope", "pretrain"]
    assert list(command.alive)[:1] == ["squeue"]


def test_a_stopped_training_gets_the_signal_at_which_megatron_saves():
    for name in RECIPES:
        for _, words in commands(name):
            if words[0] == "pretrain":
                assert words[words.index("--exit-signal") + 1] == "SIGUSR1"
                assert "--exit-signal-handler" in words


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="short benchmarks need lm-eval"
)
def test_a_rehearsal_walks_through_every_stage_of_longrope2(tmp_path):
    output = tmp_path / "a walk"
    command = [sys.executable, "examples/rehearse.py", "llama3_8b", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (output / "hf/config.json").exists() and (output / "results/report.html").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.stdout.count("done before") == 10, again.stdout
