"""What vLLM makes of an exported folder, beside transformers: docs/serving.md, `make test-serving`.

vLLM pins a torch of its own, so it runs in another environment, as a process: one for all models
of a length, because it takes most of a minute to start.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_hf
import torch
import transformers

from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.conversion.to_hf import write_hf_folder

VLLM = os.environ.get("LONGROPE_VLLM")  # python of the environment
if not VLLM:
    pytest.skip("vLLM: `make test-serving`", allow_module_level=True)

WINDOW = tiny_hf.WINDOW
EXTENDED = 2 * WINDOW
SHORT, LONG = 40, 100  # tokens of a prompt
ROTARY_DIM = 32  # its CPU kernels want heads of 32 and more
ATTENTION_FACTORS = {"su": 1.0801, "other": 1.3}  # "su" is what vLLM's formula gives: s = 2
CASES = [("llama", "su"), ("llama", "other"), ("qwen3", "other"), ("phi3", "other")]
pytestmark = pytest.mark.timeout(3600)  # eight starts of vLLM
TOLERANCE = 1e-4  # fp32 in two programs


def prompt(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(250, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Exports, and what vLLM computed: {(family, kind): (folder, {(room, prompt): row})}."""
    root = tmp_path_factory.mktemp("served")
    folders = {}
    for family, kind in CASES:
        model, checkpoint = root / family, root / f"{family}-megatron"
        if not checkpoint.exists():
            head = {"head_dim": ROTARY_DIM} if family == "qwen3" else {}
            tiny_hf.make_hf_folder(model, family, hidden_size=4 * ROTARY_DIM, **head)
            write_checkpoint(model, checkpoint)
        folder = folders[family, kind] = root / f"{family}-{kind}"
        write_hf_folder(
            checkpoint,
            folder,
            longrope_config=tiny_hf.factors(None, ROTARY_DIM, ATTENTION_FACTORS[kind]),
        )
    made = {case: (folder, {}) for case, folder in folders.items()}
    # A process for each room: vLLM keeps rotary modules by their parameters, without the room.
    for room, lengths in ((WINDOW, [SHORT]), (EXTENDED, [SHORT, LONG])):
        prompts = [prompt(length) for length in lengths]
        jobs = [
            {"folder": str(folder), "room": room, "prompts": prompts} for folder in folders.values()
        ]
        for (_, rows), computed in zip(made.values(), run_vllm(root, jobs), strict=True):
            rows.update(
                {(room, length): row for length, row in zip(lengths, computed, strict=True)}
            )
    return made


def run_vllm(directory, jobs):
    """The rows of each job, from vLLM's own environment."""
    given, got = directory / "jobs.json", directory / "rows.json"
    given.write_text(json.dumps(jobs))
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    worker = Path(__file__).with_name("vllm_reads.py")
    subprocess.run([VLLM, worker, given, got], check=True, env=environment, timeout=1800)
    return json.loads(got.read_text())


def without_switch(folder, which):
    """The model of a folder with one factor vector for every length, `short` or `long`."""
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = dict(config.rope_parameters)
    rope["short_factor"] = rope["long_factor"] = rope[f"{which}_factor"]
    config.rope_parameters = rope
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    return model.eval()


def log_probabilities(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize(
    ("room", "length", "which"),
    [(WINDOW, SHORT, "short"), (EXTENDED, LONG, "long"), (EXTENDED, SHORT, "long")],
    ids=["in the original window", "beyond it", "a short prompt in a long room"],
)
@pytest.mark.parametrize(("family", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_vllm_takes_the_factors_of_the_room_that_it_was_started_for(
    served, family, kind, room, length, which
):
    folder, rows = served[family, kind]
    row, tokens = rows[room, length], prompt(length)
    whole = tokens + row["tokens"]
    expected = log_probabilities(without_switch(folder, which), whole)
    actual = torch.tensor(row["prompt"] + row["continuation"])
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    other = log_probabilities(without_switch(folder, "short" if which == "long" else "long"), whole)
    assert (actual - other).abs().max() > 100 * TOLERANCE
