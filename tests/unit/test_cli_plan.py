"""`longrope plan`: what it prints, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_longrope
from megatron_longrope.cli import main
from megatron_longrope.plan import plan_command
from megatron_longrope.plan.model import MODELS


def run(text: str) -> int:
    return main(["--debug", "plan", *text.split()])


def answer(capsys, text: str) -> tuple[int, dict]:
    code = run(f"{text} --json")
    return code, json.loads(capsys.readouterr().out)


def test_a_run_that_fits_prints_its_memory_hours_and_flags(capsys):
    assert run("--model llama2-7b --length 256k --gpus 16") == 0
    out = capsys.readouterr().out
    for text in (
        "262144 tokens (256k)",
        "memory per GPU:",
        "reserve (CUDA, NCCL, fragmentation)",
        "--use-distributed-optimizer",
        "--no-create-attention-mask-in-dataloader      # the mask would take 64 GiB a sequence",
        "--longrope-chunked-loss",
        "tokens/s/GPU",
    ):
        assert text in out


def test_a_run_that_does_not_fit_says_by_how_much_why_and_what_would(capsys):
    flags = "--model llama3-8b --length 256k --gpus 4 --no-chunked-loss --recompute none"
    assert run(flags) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out and "most of it activations kept (" in out
    assert "  32 GPUs (" in out
    assert "flags:" not in out


def test_the_json_holds_what_the_text_says(capsys):
    code, found = answer(capsys, "--model llama2-7b --length 256k --gpus 16 --all")
    assert code == 0 and found["fits"]
    assert found["all"][0]["layout"] == found["layout"]
    assert found["parameters"] == MODELS["llama2-7b"].parameters
    parts = found["memory_gib"]
    rest = sum(size for name, size in parts.items() if name not in ("total", "loss", "layer"))
    assert parts["total"] == pytest.approx(rest + max(parts["loss"], parts["layer"]), abs=0.01)


def test_the_flags_to_paste_give_the_same_estimate(capsys):
    _, found = answer(capsys, "--model llama2-7b --length 256k --gpus 16 --steps 400")
    model = (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 "
        "--vocab-size 32000 --swiglu --untie-embeddings-and-output-weights --train-iters 400"
    )
    again = plan_command([*model.split(), *found["flags"]], gpu="h100", gpus=16)
    assert again.memory.gib() == found["memory_gib"]
    assert again.hours == found["hours"]


def test_what_is_given_is_kept(capsys):
    sizes = "--tensor-model-parallel-size 4 --context-parallel-size 2 --recompute full"
    _, found = answer(capsys, f"--model llama2-7b --length 128k --gpus 16 {sizes}")
    layout = found["layout"]
    assert (layout["tensor"], layout["context"], layout["recompute"]) == (4, 2, ["full"])


def test_memory_and_utilisation_can_be_given(capsys):
    base = "--model llama2-7b --length 128k --gpus 16"
    _, all_of_it = answer(capsys, base)
    _, slow = answer(capsys, f"{base} --mfu 0.1")
    assert slow["utilisation"] == pytest.approx(0.1, rel=0.1)
    assert slow["hours"] > all_of_it["hours"]
    _, tight = answer(capsys, f"{base} --gpu 989:20")
    assert tight["fits"] and tight["memory_gib"]["total"] <= 20 < all_of_it["memory_gib"]["total"]
    assert answer(capsys, f"{base} --gpu 989:10")[0] == 1


def test_a_checkpoint_is_planned_from_its_own_shape(untied_gqa, capsys):
    code, found = answer(capsys, f"--load {untied_gqa.path} --length 4k --gpus 1")
    assert code == 0 and found["parameters"] < 1e6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model llama9 --gpus 8", "model 'llama9' is unknown"),
        ("--model llama2-7b --gpus 8 --gpu v100", "GPU 'v100' is unknown"),
        ("--model llama2-7b --gpus 8 --mfu 2", "--mfu 2.0 is not in"),
        ("--model llama2-7b --gpus 7", "no layout of 7 GPUs keeps Megatron's rules"),
        ("--model llama3-8b --gpus 8 --expert-model-parallel-size 2", "parallel 2 has no experts"),
    ],
)
def test_bad_input_is_one_sentence(flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(f"--length 256k {flags}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--gpus", "--steps", "--tensor-model-parallel-size"])
def test_a_number_that_is_not_positive_is_refused_where_flags_are_read(flag, capsys):
    with pytest.raises(SystemExit):
        run(f"--length 256k --model llama2-7b --gpus 8 {flag} 0")
    assert f"argument {flag}: '0' is not a positive integer" in capsys.readouterr().err


def test_planning_needs_no_torch():
    """Modules of the plan, imported beside a package whose own start needs torch."""
    script = (
        "import sys, types\n"
        "package = types.ModuleType('megatron_longrope')\n"
        f"package.__path__ = [{str(Path(megatron_longrope.__file__).parent)!r}]\n"
        "sys.modules['megatron_longrope'] = package\n"
        "import megatron_longrope.plan as plan\n"
        "words = '--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 100 '\n"
        "words += '--swiglu --seq-length 128 --train-iters 1'\n"
        "assert plan.plan_command(words.split(), gpus=1).fits\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
