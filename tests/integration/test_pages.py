"""README's way to a long context, and pages of docs/, command by command with a toy model."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from forked_commands import forked_commands
from launching import SCRIPT
from shown_commands import shown_commands
from tiny_corpus import make_text
from tiny_hf import make_hf_folder
from toy_tokenizers import save_fast, train_byte_level

from megatron_longrope.config import LongRopeConfig

pytest.importorskip("megatron.training")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
WITHOUT_GPU = re.search(r"without a GPU add\s+`(--\S+)` to step 4", README)[1]
# Of README's numbers: two processes for eight GPUs, a window of 256 tokens and two steps.
TOY = {
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"--tensor-model-parallel-size 2 --sequence-parallel ": "",
    r"--context-parallel-size 4": "--context-parallel-size 2",
    r"\b128k\b": "1k",
    r"\b32k\b": "512",
    r"\b4k\b": "256",
    r"\b131072\b": "1024",
    r"\b2k\b": "128",
    r"\b2048k\b": "2k",
    r"\b256k\b": "1k",
    r"--context-parallel-size 8": "--context-parallel-size 2",
    r"\blong_books/": "books/",
    r"\btokenizer\.model\b": "models/base",
    r" --bf16": f" --bf16 {WITHOUT_GPU} --log-interval 1",
    r"--global-batch-size 32": "--global-batch-size 2",
    r"--train-iters 400": "--train-iters 2",
    r"--lr-warmup-iters 20": "--lr-warmup-iters 1",
    r"\bpretrain_gpt\.py": str(SCRIPT),
    r"^(.* search --load .*)$": r"\1 --num-samples 2 --max-evaluations 12",
    r"^(longrope eval passkey .*)$": r"\1 --trials 1",
}


# What needs a download or more than a toy.
NOT_HERE = ("eval ruler", "eval short", "eval tasks", "...")


def commands(text):
    """The commands of a text with toy sizes, in their order."""
    for command in (" ".join(words.split()) for words in shown_commands(text)):
        for pattern, replacement in TOY.items():
            command = re.sub(pattern, replacement, command)
        if not any(words in command for words in NOT_HERE):
            yield command


def steps():
    """README's commands, the one of pretraining as its diff leaves it."""
    text = README.partition("## From a checkpoint")[2].partition("\n## ")[0]
    text = re.sub(r"^```diff\n(?:[- ].*\n)*", "", text, flags=re.M)
    return list(commands(re.sub(r"^[+ ](?=torchrun|    |--)", "    ", text, flags=re.M)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What README takes as given: a model with its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("readme")
    for name, first in (("books", 1), ("other", 11), ("corpus", 21)):
        (folder / name).mkdir()
        for seed in range(first, first + 10):
            (folder / name / f"{seed}.txt").write_text(make_text(seed, 1500))
    texts = [path.read_text() for path in (folder / "books").iterdir()]
    model = folder / "models" / "base"
    tokenizer = train_byte_level(texts, 320)
    make_hf_folder(
        model, "llama", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256
    )
    save_fast(tokenizer, model)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Runs a command in the folder; gives what it printed."""
    with forked_commands() as programs:
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

        def run(command, where=folder):
            done = subprocess.run(
                ["bash", "-c", command], cwd=where, env=environment, capture_output=True, text=True
            )
            # `factors diff` exits with 1 where factors differ, as the recovered short ones do.
            fine = (0, 1) if "factors diff" in command else (0,)
            assert done.returncode in fine, (
                f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            )
            return done.stdout + done.stderr

        yield run


@pytest.fixture(scope="module")
def said(run):
    """Run the steps; what each of them printed."""
    printed = {}
    for command in steps():
        if "(flags of your model)" in command:
            flags = next(iter(printed.values())).partition("flags of this model:")[2]
            flags = flags.partition("or, read from")[0].replace("\\\n", " ")
            flags = shlex.join(shlex.split(flags)[2:])  # without --load
            command = command.replace("(flags of your model)", flags)
        printed[command] = run(command)
        if "--output data/search" in command:  # the sentence below it in README
            run(command.replace("books/", "other/").replace("data/search", "data/heldout"))
    return printed


def test_every_step_of_the_readme_runs_in_its_order(said):
    assert len(said) == 12


def test_the_steps_end_in_a_report_and_a_model_with_short_and_long_factors(folder, said):
    assert "perplexity" in (folder / "results" / "report.html").read_text()
    final = LongRopeConfig.load(folder / "final.json")
    assert [item.max_length for item in final.factor_sets] == [256, 1024]
    exported = json.loads((folder / "hf_model" / "config.json").read_text())
    rope = exported.get("rope_parameters") or exported["rope_scaling"]
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == list(final.factor_sets[1].rescale_factors)
    assert rope["short_factor"] == list(final.factor_sets[0].rescale_factors)
    assert rope["attention_factor"] == final.attention_factor


def test_the_fine_tuning_takes_its_steps_under_the_searched_factors(said):
    (log,) = (text for command, text in said.items() if "pretrain" in command)
    assert re.search(r"iteration +2/ +2 \|.*lm loss", log)
    assert "factors.json" in log or "LongRoPE" in log


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("howto/extend_7b.md", 3),
        ("howto/short_prompts.md", 3),
        ("howto/vllm.md", 3),
        ("howto/out_of_memory.md", 2),
        ("serving.md", 2),
        ("evaluation.md", 4),
    ],
)
def test_a_page_that_goes_on_from_there_runs_in_its_order(
    folder, said, run, page, number, tmp_path
):
    here = shutil.copytree(folder, tmp_path / "here")
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    found = list(commands(text))
    assert len(found) == number
    for command in found:
        # README's result, or another page's, has that name.
        if " search " in command and "--dry-run" not in command:
            output = command.split("--output ")[1].split()[0].removesuffix(".json")
            for path in here.glob(f"{output}[._]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        run(command, here)
