import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longrope.cli import build_parser, doctor, main
from megatron_longrope.errors import LongRopeError


def test_help_is_instant_because_it_imports_neither_torch_nor_megatron():
    code = (
        "import sys; sys.argv = ['longrope', '--version']\n"
        "from megatron_longrope.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron.core', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nonsense",
        "eval ppl --load x --data y --output z --lengths 4x",
        "eval ppl --load x --data y --output z --lengths 4k,4096",
        "eval ppl --load x --data y --output z --lengths 4k --baselines alibi",
        "search --load x --data y --target-length 0 --output z",
        "search --load x --data y --target-length 4k --output z --resume --overwrite",
    ],
)
def test_bad_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_flags_of_other_commands_are_not_made():
    """They take longer than all else of --help."""
    commands = [action for action in build_parser(["plan"])._actions if action.dest == "command"]
    num_flags = {name: len(parser._actions) for name, parser in commands[0].choices.items()}
    assert num_flags.pop("plan") > 10
    assert set(num_flags.values()) == {1}  # --help


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("ev", "eval"), ("eval pas", "passkey"), ("convert to-hf --lo", "--load --longrope-config")],
)
def test_bash_completes_commands_and_flags(typed, completed, completion):
    """In bash: what the script says matters, not how it looks."""
    complete = 'source "$0"; COMP_WORDS=(longrope "$@"); COMP_CWORD=$#; _shtab_longrope'
    done = subprocess.run(
        ["bash", "-c", complete + '; echo "${COMPREPLY[*]}"', completion, *typed.split()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == completed


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    script, printed = tmp_path_factory.mktemp("completion") / "longrope.bash", io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert not stop.value.code
    script.write_text(printed.getvalue())
    return script


SEARCH = "search --load x --data y --target-length 4k --output z"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("serach", "search"),
        ("eval passkeys", "passkey"),
        ("search --lod x", "--load"),
        (f"{SEARCH} --retreival-trials 3", "--retrieval-trials"),
        (f"{SEARCH} --space flored", "floored"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_one_that_was_meant(arguments, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("pretrain absent.py --cpu", "script absent.py does not exist"),
        ("report absent", "ppl.jsonl"),
        ("eval ppl --data y --output z --lengths 4k", "no model was given"),
        ("data inspect absent", "absent"),
        ("convert inspect absent", "absent"),
    ],
)
def test_a_refusal_is_one_sentence_and_exit_code_two(arguments, sentence, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longrope {arguments.split()[0]}: error: ")
    assert sentence in error and error.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(LongRopeError, match="does not exist"):
        main(["--debug", "pretrain", "absent.py"])


@pytest.mark.parametrize("bug", [ValueError("a bug"), RuntimeError("CUDA out of memory"), OSError])
def test_what_nobody_refused_keeps_its_traceback(bug, monkeypatch):
    """An out-of-memory error or a failed collective is only found by its traceback."""

    def fail(args):
        raise bug

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(type(bug) if isinstance(bug, Exception) else bug):
        main(["doctor"])


def test_a_reader_that_goes_early_gets_no_complaint():
    # A process: a pipe that is closed at the other end, and what Python does as it ends.
    command = [sys.executable, "-m", "megatron_longrope", "factors", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, b"")


# Processes of its own, because one of them is to be killed; neither imports torch.
@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2)")
def test_a_worker_ends_when_its_torchrun_agent_is_killed():
    worker = (
        "import signal, time; from megatron_longrope.ranks import end_with_parent\n"
        "end_with_parent(signal.SIGTERM); print('ready', flush=True); time.sleep(60)"
    )
    agent = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)\n"
        "process.stdout.readline(); print(process.pid, flush=True); process.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
