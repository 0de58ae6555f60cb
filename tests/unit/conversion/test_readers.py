"""Exports of every family with either kind of attention factor, read by both transformers.

`make readers` installs the older one beside the other.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import read_hf_folders
import tiny_hf
import torch
from transformers.utils import logging as hf_logging

from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.conversion import convert_to_hf
from megatron_longrope.conversion.families import FAMILIES
from megatron_longrope.conversion.from_hf import convert_from_hf
from megatron_longrope.conversion.verify import random_tokens, verify
from megatron_longrope.frequencies import attention_factor

pytestmark = pytest.mark.slow  # 21 conversions, and a child that imports the older transformers

OLD = Path(__file__).parents[3] / "build" / "readers" / "4.57"
LENGTHS = (tiny_hf.WINDOW // 2, tiny_hf.WINDOW + 10)
FACTORS = {"su": attention_factor("su", 2.0, tiny_hf.WINDOW), "other": 1.3}
CASES = [(family, kind) for family in FAMILIES for kind in FACTORS]


def factors(head_dim, attention):
    return LongRopeConfig(
        rotary_base=10000.0,
        rotary_dim=head_dim,
        original_max_position_embeddings=tiny_hf.WINDOW,
        factor_sets=tuple(
            FactorSet(length, tuple(1.0 + slope * index for index in range(head_dim // 2)))
            for length, slope in ((tiny_hf.WINDOW, 0.1), (2 * tiny_hf.WINDOW, 0.5))
        ),
        attention_factor=attention,
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder for every case, as `convert to-hf` writes it and verifies it; with the report."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for family in FAMILIES:
        config = tiny_hf.make_hf_folder(root / family, family, rope_theta=10000.0)
        convert_from_hf(root / family, root / f"{family}-megatron")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
        for kind, attention in FACTORS.items():
            longrope = factors(head_dim, attention)
            source, output = root / f"{family}-megatron", root / f"{family}-{kind}"
            report = convert_to_hf(source, output, longrope_config=longrope)
            torch.save([random_tokens(250, length, 0) for length in LENGTHS], output / "inputs.pt")
            made[family, kind] = source, output, longrope, report
    return made


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_installed_transformers_reads_an_export_without_a_word(exports, case, capfd):
    source, output, longrope, _ = exports[case]
    hf_logging.warning_once.cache_clear()
    report = verify(source, output, longrope_config=longrope)
    assert [item.window for item in report.windows] == ["short", "long"]
    assert "rope" not in capfd.readouterr().err


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
    if case == ("phi3", "other"):
        assert "must be a dictionary with three fields" in theirs
        assert report.remarks[0].startswith("transformers 4.57 cannot load this folder: its phi3 ")
        assert report.remarks[0] in (output / "README.md").read_text()
        return
    assert not any("cannot load" in remark for remark in report.remarks)
    for first, second in zip(read_hf_folders.read(output), theirs, strict=True):
        assert (first - second).abs().max() < 1e-5
