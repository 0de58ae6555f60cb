import json
import sys

import pytest

from megatron_longrope.recipe.stages import Stage, StageError, display, run_stages


def writer(path, text):
    """A command that appends to a file, so that every run of it shows."""
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({text!r})"]


def copier(source, target):
    code = f"open({str(target)!r}, 'w').write(open({str(source)!r}).read().upper())"
    return [sys.executable, "-c", code]


def pipeline(directory, text="x"):
    first, second = directory / "first", directory / "second"
    return [
        Stage("one", [writer(first, text)], outputs=[first]),
        Stage("two", [copier(first, second)], outputs=[second], inputs=[first]),
    ]


def test_a_finished_stage_is_not_run_again(tmp_path):
    run_stages(pipeline(tmp_path), tmp_path)
    seconds = run_stages(pipeline(tmp_path), tmp_path)
    assert (tmp_path / "first").read_text() == "x"
    assert set(seconds) == {"one", "two"} and all(value > 0 for value in seconds.values())


def test_a_changed_command_starts_clean_and_its_readers_follow(tmp_path):
    run_stages(pipeline(tmp_path), tmp_path)
    run_stages(pipeline(tmp_path, "y"), tmp_path)
    assert (tmp_path / "first").read_text() == "y"
    assert (tmp_path / "second").read_text() == "Y"


def test_a_missing_output_is_made_again(tmp_path):
    run_stages(pipeline(tmp_path), tmp_path)
    (tmp_path / "second").unlink()
    run_stages(pipeline(tmp_path), tmp_path)
    assert (tmp_path / "second").read_text() == "X"


def test_an_interrupted_stage_keeps_its_partial_output_for_the_command_to_resume(tmp_path):
    target, allowed = tmp_path / "part", tmp_path / "allowed"
    code = (
        f"import os, sys; open({str(target)!r}, 'a').write('z'); "
        f"sys.exit(0 if os.path.exists({str(allowed)!r}) else 3)"
    )
    stage = Stage("only", [[sys.executable, "-c", code]], outputs=[target])
    with pytest.raises(StageError, match="stage only failed with exit code 3"):
        run_stages([stage], tmp_path)
    allowed.touch()
    run_stages([stage], tmp_path)
    assert target.read_text() == "zz"


def test_a_failure_names_the_log_and_shows_its_end(tmp_path):
    command = [sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(1)"]
    with pytest.raises(StageError, match=r"(?s)logs/bad\.log.*what went wrong"):
        run_stages([Stage("bad", [command], outputs=[])], tmp_path)


def test_a_stage_that_does_not_write_its_output_fails(tmp_path):
    stage = Stage("empty", [[sys.executable, "-c", ""]], outputs=[tmp_path / "absent"])
    with pytest.raises(StageError, match="ended without its output"):
        run_stages([stage], tmp_path)
    stamp = json.loads((tmp_path / "stages/empty.json").read_text())
    assert stamp["finished"] is False


def test_stage_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match="must differ"):
        run_stages([Stage("a", [], outputs=[]), Stage("a", [], outputs=[])], tmp_path)


def test_commands_are_shown_as_a_person_types_them():
    assert display([sys.executable, "-m", "megatron_longrope", "doctor"]) == "longrope doctor"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "-m", "megatron_longrope", "x"]
    assert display(torchrun) == "torchrun -m megatron_longrope x"
