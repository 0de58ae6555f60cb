"""One sentence, and every rank ends: the words here, the processes below."""

from argparse import Namespace
from pathlib import Path

import pytest
from launching import TIMEOUT_S, Command, Ranks
from tiny_gpt import run_arguments

from megatron_longrope.integration import agreement, attention_choice, wrappers
from megatron_longrope.integration.agreement import Finding, disagreement


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process without torchrun, which has found nothing yet."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(agreement, "_pending", None)


# The sentence


@pytest.mark.parametrize(
    ("findings", "sentence"),
    [
        ([Finding(fingerprint="a"), Finding(fingerprint="a")], None),
        ([Finding(), Finding()], None),
        ([Finding(error="no file"), Finding(error="no file")], "no file"),
        ([Finding(fingerprint="a"), Finding(error="no file")], "no file (rank 1)"),
        ([Finding(error="no file"), Finding(fingerprint="a")], "no file (rank 0)"),
        (
            [Finding(fingerprint="a"), *[Finding(error="no file")] * 6],
            "no file (6 ranks: 1, 2, 3, 4, ...)",
        ),
        (
            [Finding(fingerprint="a"), Finding(fingerprint="b"), Finding(fingerprint="a")],
            "the LongRoPE factors of rank 1 differ from those of rank 0; give every rank the same "
            "--longrope-config file",
        ),
        (
            [Finding(attention="flash"), Finding(attention="flash"), Finding(attention="sdpa")],
            "rank 0 has flash attention and rank 2 sdpa; give every node the same packages, or "
            "--longrope-attention",
        ),
        (
            [Finding(), Finding(fingerprint="b"), Finding(fingerprint="b")],
            "the LongRoPE factors of 2 ranks: 1, 2 differ from those of rank 0; give every rank "
            "the same --longrope-config file",
        ),
    ],
)
def test_what_ranks_found_becomes_one_sentence_or_none(findings, sentence):
    assert disagreement(findings) == sentence


# One process


def test_a_single_process_stops_at_once():
    for stop in (
        lambda: agreement.stop("no file"),
        lambda: agreement.record(Finding(error="no file")),
        lambda: agreement.decide("no file"),
    ):
        with pytest.raises(SystemExit) as error:
            stop()
        assert error.value.code == "longrope: error: no file"


def test_a_single_process_without_an_error_goes_on():
    agreement.record(Finding(fingerprint="a"))
    agreement.settle()
    agreement.decide(None)


@pytest.mark.parametrize("word", ["--longrope-config=f.json", "--longrope-chunked-loss"])
def test_flags_that_a_yaml_file_has_replaced_end_the_run(monkeypatch, word):
    # Megatron's --yaml-cfg puts the file's settings in the place of all parsed arguments.
    monkeypatch.setattr(wrappers, "_megatron_args", lambda: Namespace(rank=0))
    initialize = wrappers.with_agreement(lambda: "groups")
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--yaml-cfg", "f.yaml"])
    assert initialize() == "groups"
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--yaml-cfg", "f.yaml", word])
    with pytest.raises(SystemExit) as error:
        initialize()
    assert error.value.code == (
        f"longrope: error: {word.partition('=')[0]} was given but Megatron did not validate its "
        "arguments (--yaml-cfg skips that); give all settings as flags"
    )


# Several processes


def test_other_ranks_wait_to_be_ended_and_end_by_themselves(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(agreement.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as error:
        agreement.stop("no file")
    assert error.value.code == 1
    assert len(waited) == 1 and 5 <= waited[0] <= 60
    assert capsys.readouterr() == ("", "")


def test_an_error_of_one_rank_waits_for_the_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    agreement.record(Finding(error="no file"))
    agreement.settle()  # nobody can hear it yet
    assert agreement._pending == Finding(error="no file")


def test_attention_that_one_node_lacks_is_said_once_the_others_can_hear(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(attention_choice, "flash_obstacle", lambda dropout: "no flash-attn here")
    wrappers.configure(run_arguments(longrope_attention="flash"))
    assert "no flash-attn here" in agreement._pending.error


def test_a_model_is_not_built_over_an_error_that_no_rank_has_heard_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    agreement.require()
    agreement.record(Finding(error="no file"))
    with pytest.raises(SystemExit, match="longrope: error: no file"):
        agreement.require()


def test_without_a_process_group_a_decision_is_the_ranks_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="no file"):
        agreement.decide("no file")
    agreement.decide(None)


PROCESS = """\
import os, sys
import torch.distributed as dist
from megatron_longrope.integration import agreement
from megatron_longrope.integration.agreement import Finding

os.environ.update(RANK=sys.argv[3], WORLD_SIZE="2")
rank, cases = int(sys.argv[3]), {
    "agreement": [Finding(fingerprint="a"), Finding(fingerprint="a")],
    "one error": [Finding(fingerprint="a"), Finding(error="no file")],
    "difference": [Finding(fingerprint="a"), Finding(fingerprint="b")],
    "later": [None, "no factors"],
}
mine = cases[sys.argv[1]][rank]
if isinstance(mine, Finding):
    agreement.record(mine)
    agreement.settle()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
if isinstance(mine, Finding):
    agreement.settle()
    agreement.decide(None)
else:
    agreement.decide(mine)
print("went on")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("agreement", None),
        ("one error", "no file (rank 1)"),
        ("difference", "the LongRoPE factors of rank 1 differ from those of rank 0; give"),
        ("later", "no factors (rank 1)"),
    ],
)
def test_two_processes_go_on_together_or_stop_together(tmp_path, case, sentence):
    (tmp_path / "rank.py").write_text(PROCESS)
    # Each by itself, without an agent that would end the other one.
    ranks, printed = [], []
    for rank in range(2):
        words = (str(tmp_path / "rank.py"), case, str(tmp_path / "store"), str(rank))
        printed += [(tmp_path / f"{rank}.out").open("w+"), (tmp_path / f"{rank}.err").open("w+")]
        ranks.append(Ranks(Command(words), tmp_path, *printed[-2:]))
    try:
        statuses = [item.wait(TIMEOUT_S) for item in ranks]
    finally:
        for item in ranks:
            item.end()
    out, errors, _, silence = (Path(file.name).read_text() for file in printed)
    assert statuses == [0 if sentence is None else 1] * 2
    assert ("went on" in out) is (sentence is None)
    told = [line for line in errors.splitlines() if line.startswith("longrope: error: ")]
    assert [line.startswith(f"longrope: error: {sentence}") for line in told] == [True] * len(told)
    assert len(told) == (0 if sentence is None else 1)
    assert "longrope: error" not in silence
    assert "Traceback" not in errors + silence
