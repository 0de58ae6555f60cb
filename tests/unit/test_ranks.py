"""Several processes that nobody numbered are refused; each would do the whole work alone."""

import pytest

import megatron_longrope
from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration import launcher
from megatron_longrope.ranks import require_alone

COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*COUNTS, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", COUNTS)
def test_one_of_several_processes_without_a_rank_is_refused(name, monkeypatch):
    for alone in ("", "1", "many"):
        monkeypatch.setenv(name, alone)
        require_alone()
    monkeypatch.setenv(name, "8")
    with pytest.raises(LongRopeError, match=f"^{name} is 8 and RANK is not set, .*; start them"):
        require_alone()
    monkeypatch.setenv("RANK", "3")
    require_alone()


def test_a_shell_of_salloc_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    require_alone()


def test_no_command_of_several_ranks_starts_without_them(monkeypatch, tmp_path):
    process_groups = pytest.importorskip("megatron_longrope.engine.process_groups")
    monkeypatch.setattr(process_groups.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    save = tmp_path / "save"
    for begin in (
        lambda: launcher.launch(__file__, ["--save", str(save)]),
        lambda: megatron_longrope.evaluate(None),
        process_groups.initialize,  # a search
    ):
        with pytest.raises(LongRopeError, match="SLURM_STEP_NUM_TASKS is 8 and RANK is not set"):
            begin()
    assert not save.exists()
