"""What is wrong ends a run before its model is built: one sentence of rank 0, every rank ends.

The launch would take ten minutes if anything waited for a rank that has gone: it gets three.
"""

from dataclasses import replace

import launching
import pytest
from launching import SCRIPT, two_agents
from tiny_gpt import run_arguments
from tiny_training import HEAD_DIM, MODEL, refusal, yarn_config

from megatron_longrope.integration import agreement, wrappers
from megatron_longrope.integration.agreement import Finding

CONFIG = yarn_config(2, 2048)


# Through the wrapper around Megatron's validation


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(agreement, "_pending", None)
    yield
    wrappers.activate(None)


@pytest.fixture
def path(tmp_path):
    CONFIG.save(tmp_path / "factors.json")
    return str(tmp_path / "factors.json")


def validate(path, **changes):
    args = run_arguments(
        **{"longrope_config": path, "kv_channels": HEAD_DIM, "seq_length": 128} | changes
    )
    return wrappers.with_validation(lambda args: args)(args)


def test_a_good_file_is_compared_between_ranks_by_its_content(monkeypatch, path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    validate(path)
    ours = agreement._pending
    other = CONFIG.with_factor_set(replace(CONFIG.factor_sets[1], num_start_tokens=4))
    other.save(path)
    validate(path, rank=1)
    assert ours.error is agreement._pending.error is None
    assert ours.fingerprint != agreement._pending.fingerprint
    validate(None)
    assert agreement._pending == Finding(attention="sdpa")


# Two processes

# Each rank in a directory of its own, like nodes without a shared disk.
BY_RANK = """\
import os, sys
os.chdir(os.environ["RANK"])
from megatron_longrope.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
def test_a_file_that_the_second_node_lacks_is_named_by_rank_0_and_ends_both_torchruns(tmp_path):
    pytest.importorskip("megatron.training")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    CONFIG.save(tmp_path / "0" / "factors.json")
    script = tmp_path / "by_rank.py"
    script.write_text(BY_RANK)
    command = [str(script), "pretrain", str(SCRIPT), "--cpu", *MODEL]
    ended = launching.run(two_agents([*command, "--longrope-config", "factors.json"]), tmp_path)
    assert refusal(*ended) == "factors.json: no such file; check the path (rank 1)"
