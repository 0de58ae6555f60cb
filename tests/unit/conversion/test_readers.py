"""Exports of every family, scaling and published list, read by both transformers; docs/models.md.

`make readers` installs the older transformers beside the other.
"""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import read_hf_folders
import tiny_hf
import torch
import transformers
from tiny_hf import tensors
from transformers.utils import logging as hf_logging

from megatron_longrope import published
from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.checkpoint.hf.families import FAMILIES
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.conversion.verify import fp32_engine, random_tokens, verify
from megatron_longrope.frequencies import attention_factor

pytestmark = pytest.mark.slow  # 37 conversions, and a child that imports the older transformers

OLD = Path(__file__).parents[3] / "build" / "readers" / "4.57"
LENGTHS = (tiny_hf.WINDOW // 2, tiny_hf.WINDOW + 10)
FACTORS = {"su": attention_factor("su", 2.0, tiny_hf.WINDOW), "other": 1.3}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# name -> (family, changes of its config.json)
MODELS = {
    **{family: (family, {}) for family in FAMILIES},
    "phi4_mini": ("phi3", {"partial_rotary_factor": 0.75, "hidden_size": 64}),
    "llama3_1": ("llama", {"rope_scaling": LLAMA3}),
    "qwen2_yarn": ("qwen2", {"rope_scaling": YARN}),
    "llama_linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
}
CASES = [(name, kind) for name in MODELS for kind in FACTORS]
# The model as it is, without factors: what a scaled base and partial rotation become.
CASES += [(name, "bare") for name in list(MODELS)[len(FAMILIES) :]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder for every case, as `convert to-hf` writes it and verifies it; with the report."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for name, (family, changes) in MODELS.items():
        tiny_hf.make_hf_folder(root / name, family, rope_theta=10000.0, **changes)
        source = root / f"{name}-megatron"
        imported = write_checkpoint(root / name, source)
        for case, kind in CASES:
            if case != name:
                continue
            output, stored = root / f"{name}-{kind}", imported.longrope_config
            longrope = stored
            if kind != "bare":
                longrope = tiny_hf.factors(stored, imported.shape.rotary_dim, FACTORS[kind])
            report = write_hf_folder(source, output, longrope_config=longrope)
            torch.save([random_tokens(250, length, 0) for length in LENGTHS], output / "inputs.pt")
            made[name, kind] = source, output, longrope, report
    return made


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_to_the_bit_and_greedy_generation_is_the_engines(exports, name):
    source, output, longrope, _ = exports[name, "su"]
    before, after = tensors(output.parent / name), tensors(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    engine = fp32_engine(MegatronCheckpoint.open(source), longrope)
    prompt = random_tokens(250, 20, 1)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = prompt
    for _ in range(8):
        following = engine.logits(ours)[0, -1, :250].argmax()
        ours = torch.cat([ours, following.view(1, 1)], dim=1)
    assert torch.equal(theirs, ours)


@pytest.fixture
def said():
    """What transformers logs; its own handler writes to where stderr was when it was imported."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    hf_logging.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_installed_transformers_reads_an_export_without_a_word(exports, case, said):
    source, output, longrope, _ = exports[case]
    report = verify(source, output, longrope_config=longrope)
    windows = [item.window for item in report.windows]
    assert windows == (["short"] if case[1] == "bare" else ["short", "long"])
    if FAMILIES[MODELS[case[0]][0]].bare_longrope and case[1] == "su":
        # 4.57 refuses the `factor` that 5.x would like.
        assert [text[:33] for text in said] == ["This model config has set a `rope"]
        return
    assert not said


@pytest.mark.parametrize("name", list(MODELS)[len(FAMILIES) :])
def test_the_model_itself_and_its_bare_export_have_the_same_logits(exports, tmp_path, name):
    _, output, *_ = exports[name, "bare"]
    before = output.parent / name
    torch.save(torch.load(output / "inputs.pt"), before / "inputs.pt")
    for first, second in zip(
        read_hf_folders.read(before), read_hf_folders.read(output), strict=True
    ):
        assert torch.equal(first, second)


@pytest.fixture(scope="module")
def old(exports, tmp_path_factory):
    if not (OLD / "transformers").is_dir():
        pytest.skip(f"transformers 4.57 is not in {OLD}: make readers")
    result = tmp_path_factory.mktemp("old") / "logits.pt"
    folders = [str(output) for _, output, *_ in exports.values()]
    done = subprocess.run(
        [sys.executable, read_hf_folders.__file__, str(result), *folders],
        env={**os.environ, "PYTHONPATH": str(OLD)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(result)
    assert found["version"].startswith("4.57.")
    return found["folders"]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_transformers_4_57_gives_the_same_logits_or_the_report_says_that_it_cannot(
    exports, old, case
):
    _, output, _, report = exports[case]
    theirs = old[str(output)]
    if MODELS[case[0]][0] == "phi3" and case[1] == "other":
        assert "must be a dictionary with three fields" in theirs
        assert report.remarks[0].startswith("transformers 4.57 cannot load this folder: its phi3 ")
        assert report.remarks[0] in (output / "README.md").read_text()
        return
    assert not any("cannot load" in remark for remark in report.remarks)
    for first, second in zip(read_hf_folders.read(output), theirs, strict=True):
        assert (first - second).abs().max() < 1e-5


# Published factors

PUBLISHED = {
    name: ("phi3", {"partial_rotary_factor": 0.75} if name == "phi-4-mini" else {})
    if name.startswith("phi")
    else ("mistral" if name.startswith("mistral") else "llama", {})
    for name in published.names()
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.filterwarnings("ignore:.*no search would propose")
def test_published_factors_give_the_same_logits_within_and_past_the_original_window(tmp_path, name):
    """With one attention factor for both windows, as transformers holds it."""
    family, changes = PUBLISHED[name]
    longrope = LongRopeConfig.load(f"published:{name}")
    longrope = replace(
        longrope, attention_factor=longrope.attention_factor_for(longrope.max_length)
    )
    head_dim = int(longrope.rotary_dim / changes.get("partial_rotary_factor", 1.0))
    tiny_hf.make_hf_folder(
        tmp_path / "hf", family,
        hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, rope_theta=longrope.rotary_base,
        max_position_embeddings=longrope.original_max_position_embeddings, **changes,
    )  # fmt: skip
    write_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    write_hf_folder(tmp_path / "megatron", tmp_path / "back", longrope_config=longrope)
    report = verify(tmp_path / "megatron", tmp_path / "back", longrope_config=longrope)
    original = longrope.original_max_position_embeddings
    assert [item.num_tokens for item in report.windows] == [512, original + 64]


def test_the_tables_of_docs_models_md_list_what_is_verified_here():
    page = Path(__file__).parents[3] / "docs" / "models.md"
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert rows[0] == ("model", "model_type")
    assert rows[1:] == [(name, family) for name, (family, _) in (MODELS | PUBLISHED).items()]
