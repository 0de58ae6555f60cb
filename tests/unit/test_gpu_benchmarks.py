"""The GPU script runs on a CPU at toy sizes, and keeps what it has when a part fails or hangs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))
import kernels  # noqa: E402
import run as gpu_run  # noqa: E402
import train_step  # noqa: E402


# The script is what runs unseen on a GPU, so its processes are real ones here.
@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["kernels"], id="kernels"),
        pytest.param(list(gpu_run.PARTS), marks=pytest.mark.release, id="all"),
    ],
)
def test_the_script_ends_with_a_result_of_every_part(tmp_path, parts):
    pytest.importorskip("megatron.training")
    done = subprocess.run(
        [str(GPU / "run.sh"), str(tmp_path), "--quick", "--only", *parts],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
    )
    logs = "".join(path.read_text()[-1500:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [part["part"] for part in summary] == parts
    assert all(part["ended"] == "done" and part["results"] > 1 for part in summary)
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [row["passes"] for row in rows if row.get("kernel") == "sdpa"] == [True, True]


def test_a_part_that_fails_or_hangs_leaves_its_results_and_the_others(tmp_path, monkeypatch):
    parts = {"fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "works": ""}
    scripts = {}
    for name, ending in parts.items():
        script = tmp_path / f"{name}.py"
        script.write_text(
            f"import sys\nopen(sys.argv[sys.argv.index('--output') + 1], 'a').write('{{}}\\n')\n"
            f"{ending}\n"
        )
        scripts[name] = ((str(script),), 2 if name == "hangs" else 60)
    monkeypatch.setattr(gpu_run, "PARTS", scripts)
    ended = {name: gpu_run.run_part(name, tmp_path, False) for name in parts}
    assert {name: part["ended"] for name, part in ended.items()} == {
        "fails": "exit status 3",
        "hangs": "stopped after its 2 s",
        "works": "done",
    }
    assert all(part["results"] == 1 for part in ended.values())


def crashes(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def wrong(query, key, value, **_):
    return query.flatten(-2) + 0 * (key.sum() + value.sum())


@pytest.mark.parametrize("kernel", [crashes, wrong])
def test_a_kernel_that_is_wrong_or_fails_is_no_success(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(kernels, "build", lambda *_: kernel)
    monkeypatch.setattr(kernels.gpu, "start", lambda _: torch.device("cpu"))
    output = tmp_path / "kernels.jsonl"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--output", str(output)])
    assert kernels.main() == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["passes"] for row in rows if row.get("kernel") == "sdpa"] == [False, False]
    assert all("skipped" in row for row in rows if row.get("kernel") == "flash")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("train_step.py --lengths 32q", "length '32q' is not a positive integer"),
        ("train_step.py --quick --lengths 128,256", "each must be above the window, 128"),
        ("train_step.py --quick --steps 0", "--steps is 0; it must be at least 1"),
        ("engine.py passkey --attention flesh", "invalid choice: 'flesh'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(words, sentence, monkeypatch, capsys):
    script, *flags = words.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(GPU / script), run_name="__main__")
    assert sentence in f"{refused.value}{capsys.readouterr().err}"


def test_training_steps_record_the_ratio_of_each_length_once(tmp_path, monkeypatch):
    def measured(_, length, *__):
        if length > 512:
            raise torch.OutOfMemoryError
        return {"stock": {"seconds": 2.0}, "longrope": {"seconds": 2.0 + length / 256}}

    monkeypatch.setattr(train_step, "measure_length", measured)
    monkeypatch.setattr(train_step.gpu, "start", lambda _: torch.device("cpu"))
    output = tmp_path / "train_step.jsonl"
    words = ["train_step.py", "--quick", "--lengths", "256,512,1k", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    train_step.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["tokens"], row["ratio"]) for row in rows if "ratio" in row] == [
        (256, 1.5),
        (512, 2.0),
    ]
    assert "environment" in rows[-1]


def test_all_parts_together_end_within_eight_minutes():
    assert sum(limit for _, limit in gpu_run.PARTS.values()) <= 480
