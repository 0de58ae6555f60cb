"""Exports of every family with either kind of attention factor, read by both transformers.

`make readers` installs the older one beside the other.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import read_hf_folders
import tiny_hf
import torch
from transformers.utils import logging as hf_logging

from megatron_longrope.config import FactorSet, identity_config
from megatron_longrope.conversion import convert_to_hf
from megatron_longrope.conversion.families import FAMILIES
from megatron_longrope.conversion.from_hf import convert_from_hf
from megatron_longrope.conversion.verify import random_tokens, verify
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


def factors(stored, rotary_dim, attention):
    base = stored or identity_config(10000.0, rotary_dim, tiny_hf.WINDOW)
    sets = (
        FactorSet(length, tuple(1.0 + slope * index for index in range(rotary_dim // 2)))
        for length, slope in ((tiny_hf.WINDOW, 0.1), (2 * tiny_hf.WINDOW, 0.5))
    )
    return replace(base, factor_sets=tuple(sets), attention_factor=attention)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder for every case, as `convert to-hf` writes it and verifies it; with the report."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for name, (family, changes) in MODELS.items():
        tiny_hf.make_hf_folder(root / name, family, rope_theta=10000.0, **changes)
        source = root / f"{name}-megatron"
        imported = convert_from_hf(root / name, source)
        for case, kind in CASES:
            if case != name:
                continue
            output, stored = root / f"{name}-{kind}", imported.longrope_config
            longrope = stored
            if kind != "bare":
                longrope = factors(stored, imported.shape.rotary_dim, FACTORS[kind])
            report = convert_to_hf(source, output, longrope_config=longrope)
            torch.save([random_tokens(250, length, 0) for length in LENGTHS], output / "inputs.pt")
            made[name, kind] = source, output, longrope, report
    return made


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_installed_transformers_reads_an_export_without_a_word(exports, case, capfd):
    source, output, longrope, _ = exports[case]
    hf_logging.warning_once.cache_clear()
    report = verify(source, output, longrope_config=longrope)
    windows = [item.window for item in report.windows]
    assert windows == (["short"] if case[1] == "bare" else ["short", "long"])
    assert "rope" not in capfd.readouterr().err


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
