"""Conversions that end early: what is left, and how the next one goes on."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
import torch
from tiny_hf import tensors
from tokenizers import Tokenizer, models

from megatron_longrope.checkpoint import MegatronCheckpoint
from megatron_longrope.conversion import megatron_writer, verify
from megatron_longrope.conversion.from_hf import write_checkpoint
from megatron_longrope.conversion.staging import StagingFolder, file_identity, staging_folder
from megatron_longrope.conversion.tensors import TensorSource
from megatron_longrope.conversion.to_hf import write_hf_folder

SHARDS = {"max_shard_bytes": 40_000}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class Interrupt:
    """A `progress` that ends the conversion once so many bytes are written."""

    def __init__(self, share, error=KeyboardInterrupt):
        self.share, self.error, self.calls = share, error, []

    def __call__(self, done, total):
        self.calls.append(done)
        if done >= self.share * total:
            raise self.error


class Calls(list):
    """A `progress` that remembers the bytes done; the first are those of an earlier run."""

    def __call__(self, done, total):
        self.append(done)


@pytest.fixture
def interrupted(untied_gqa, config, tmp_path):
    """Ctrl-C in the middle of an export to `tmp_path/hf`; gives its staging folder."""
    with pytest.raises(KeyboardInterrupt) as caught:
        write_hf_folder(
            untied_gqa.path,
            tmp_path / "hf",
            longrope_config=config,
            progress=Interrupt(0.6),
            **SHARDS,
        )
    (staging,) = tmp_path.iterdir()
    assert str(staging) in caught.value.__notes__[0]
    return staging


def files_read(monkeypatch):
    """Names of the tensors that are loaded from now on."""
    names, load = [], TensorSource.load
    monkeypatch.setattr(
        TensorSource, "load", lambda self, item: names.append(item.name) or load(self, item)
    )
    return names


def test_what_was_complete_is_not_written_again(
    untied_gqa, config, tmp_path, interrupted, monkeypatch
):
    kept = {path.name: path.stat() for path in (interrupted / "result").glob("*.safetensors")}
    assert kept
    assert not list(interrupted.rglob(".*.tmp"))
    names, calls = files_read(monkeypatch), Calls()
    report = write_hf_folder(
        untied_gqa.path, tmp_path / "hf", longrope_config=config, progress=calls, **SHARDS
    )
    assert 0 < calls[0] < calls[-1] == report.num_bytes
    assert 0 < len(names) < report.num_tensors
    for name, before in kept.items():
        assert (tmp_path / "hf" / name).stat().st_mtime_ns == before.st_mtime_ns
    write_hf_folder(untied_gqa.path, tmp_path / "whole", longrope_config=config, **SHARDS)
    assert equal(tensors(tmp_path / "hf"), tensors(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "whole"]


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.bfloat16}, {"max_shard_bytes": 50_000}, {"target_length": 128}]
)
def test_other_options_start_anew(untied_gqa, config, tmp_path, interrupted, changes, monkeypatch):
    names = files_read(monkeypatch)
    options = {"longrope_config": config, **SHARDS, **changes}
    report = write_hf_folder(untied_gqa.path, tmp_path / "hf", **options)
    assert len(names) == report.num_tensors
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_another_checkpoint_starts_anew(megatron_runs, config, tmp_path, interrupted):
    calls = Calls()
    write_hf_folder(
        megatron_runs["tied_mha"].path,
        tmp_path / "hf",
        longrope_config=config,
        progress=calls,
        **SHARDS,
    )
    assert calls[0] == 0
    assert "lm_head.weight" not in tensors(tmp_path / "hf")


def test_a_file_that_was_damaged_meanwhile_is_written_again(
    untied_gqa, config, tmp_path, interrupted
):
    first = sorted((interrupted / "result").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-10])
    write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, **SHARDS)
    write_hf_folder(untied_gqa.path, tmp_path / "whole", longrope_config=config, **SHARDS)
    assert equal(tensors(tmp_path / "hf"), tensors(tmp_path / "whole"))


def test_a_verification_that_runs_out_of_memory_or_breaks_keeps_what_was_converted(
    exported, tmp_path, monkeypatch
):
    def convert(check=None, progress=None):
        write_checkpoint(exported, tmp_path / "x", check=check, progress=progress, **SHARDS)

    def breaks(error):
        def raises(*_):
            raise error

        monkeypatch.setattr(verify, "_load_transformers_model", raises)
        with pytest.raises(Exception) as caught:
            convert(lambda path: verify.verify_import(path, exported))
        return caught.value

    error = breaks(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 250.00 MiB"))
    assert re.fullmatch(
        "verification ran out of memory.* --no-verify.* complete files are kept in .*", str(error)
    )
    error = breaks(RuntimeError("a bug"))
    assert "complete files are kept in" in error.__notes__[0]
    convert(progress=(calls := Calls()))
    assert calls[0] > 0


@pytest.fixture(scope="module")
def exported(megatron_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    write_hf_folder(
        megatron_runs["untied_gqa"].path, folder, longrope_config=maker.longrope_config()
    )
    return folder


def test_an_interrupted_import_goes_on(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_writer, "_BLOCK_BYTES", 10_000)  # embeddings in several pieces
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(exported, tmp_path / "ckpt", progress=Interrupt(0.6), **SHARDS)
    (staging,) = tmp_path.iterdir()
    kept = {path.name: path.stat() for path in staging.rglob("*.distcp")}
    assert len(kept) > 2
    calls = Calls()
    report = write_checkpoint(exported, tmp_path / "ckpt", progress=calls, **SHARDS)
    assert 0 < calls[0] < calls[-1] == report.num_bytes
    for name, before in kept.items():
        assert (tmp_path / "ckpt" / "release" / name).stat().st_mtime_ns == before.st_mtime_ns
    write_checkpoint(exported, tmp_path / "whole")
    ours, theirs = (MegatronCheckpoint.open(tmp_path / name) for name in ("ckpt", "whole"))
    names = theirs.keys()
    assert ours.keys() == names
    for name in names:
        assert torch.equal(ours.tensor(name), theirs.tensor(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "whole"]


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_same_command_continues(exported, tmp_path):
    output = tmp_path / "ckpt"
    code = (
        "import sys, time\n"
        "from megatron_longrope.conversion.from_hf import write_checkpoint\n"
        "def wait(done, total):\n"
        "    if done > 0.6 * total:\n"
        "        print('here', flush=True)\n"
        "        time.sleep(600)\n"
        "write_checkpoint(*sys.argv[1:], max_shard_bytes=40_000, progress=wait)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(exported), str(output)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"here\n"
    with pytest.raises(ValueError, match=r"is being written by process .*; wait for that one"):
        write_checkpoint(exported, output, **SHARDS)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not output.exists()
    report = write_checkpoint(exported, output, progress=(calls := Calls()), **SHARDS)
    assert calls[0] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    back = tmp_path / "back"
    write_hf_folder(output, back, longrope_config=report.longrope_config)
    assert equal(tensors(back), tensors(exported))


# The disk


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    untied_gqa, config, exported, tmp_path, direction
):
    full = Interrupt(0.6, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ValueError, match="the disk is full; nothing was left behind"):
        if direction == "to":
            write_hf_folder(
                untied_gqa.path, tmp_path / "x", longrope_config=config, progress=full, **SHARDS
            )
        else:
            write_checkpoint(exported, tmp_path / "x", progress=full, **SHARDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "calls", [("pathlib.Path.mkdir",), ("pathlib.Path.write_text", "tempfile.mkstemp")]
)
def test_a_disk_that_is_full_from_the_beginning_is_one_sentence_and_leaves_nothing(
    exported, tmp_path, monkeypatch, calls
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(name, full)
        with pytest.raises(ValueError, match="the disk is full; nothing was left behind"):
            write_checkpoint(exported, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "place"),
    [
        ("EIO", None),
        ("EIO", "tempfile.mkstemp"),
        ("EMFILE", "torch.distributed.checkpoint.FileSystemReader.read_data"),
        ("ESTALE", "pathlib.Path.open"),
    ],
)
def test_another_error_of_the_disk_is_one_sentence_and_keeps_what_is_complete(
    untied_gqa, config, exported, tmp_path, monkeypatch, code, place
):
    number = getattr(errno, code)
    error = OSError(number, os.strerror(number))

    def break_off(*_, **__):
        raise error

    def convert(progress):
        if place == "pathlib.Path.open":
            write_checkpoint(exported, tmp_path / "x", progress=progress, **SHARDS)
        else:
            write_hf_folder(
                untied_gqa.path,
                tmp_path / "x",
                longrope_config=config,
                progress=progress,
                **SHARDS,
            )

    with monkeypatch.context() as patch:

        def fail(done, total):
            if done >= 0.6 * total and place:
                patch.setattr(place, break_off)
            elif done >= 0.6 * total:
                raise error

        sentence = rf"{os.strerror(number)}; complete files are kept in .*\.x\.converting"
        with pytest.raises(ValueError, match=sentence):
            convert(fail)
    with monkeypatch.context() as patch:  # nor does one at the start of the next run lose them
        read = Path.read_text
        patch.setattr(
            Path, "read_text",
            lambda path, **how: (
                break_off() if path.name == "fingerprint.json" else read(path, **how)
            ),
        )  # fmt: skip
        with pytest.raises(ValueError, match=os.strerror(number)):
            convert(Calls())
    convert(calls := Calls())
    assert calls[0] > 0


def test_a_result_that_cannot_take_its_name_is_kept_and_so_is_what_has_it(
    untied_gqa, config, tmp_path, monkeypatch
):
    output = tmp_path / "hf"
    output.mkdir()
    (output / "precious").touch()
    rename = Path.rename

    def refuse(self, target):
        if self.name == "result":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(self, target)

    options = {"longrope_config": config, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(ValueError, match=r"cannot take its name .*; the result is complete "):
            write_hf_folder(untied_gqa.path, output, **options)
    assert (output / "precious").exists()
    write_hf_folder(untied_gqa.path, output, progress=(calls := Calls()), **options)
    assert calls[0] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    untied_gqa, config, tmp_path, monkeypatch
):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(TensorSource, "load", None)
    with pytest.raises(ValueError, match="has 1000 bytes free and needs "):
        write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config)
    assert list(tmp_path.iterdir()) == []


# The staging folder


@pytest.mark.parametrize("place", ["tokenizer", "iteration"])
def test_an_export_into_a_folder_that_it_reads_is_continued(
    untied_gqa, config, exported, tmp_path, place
):
    save = shutil.copytree(untied_gqa.path, tmp_path / "save")
    tokenizer = shutil.copytree(exported, tmp_path / "tokenizer")
    tokens = {f"t{index}": index for index in range(250)}
    Tokenizer(models.WordLevel(tokens, unk_token="t0")).save(str(tokenizer / "tokenizer.json"))
    holder = tokenizer if place == "tokenizer" else MegatronCheckpoint.open(save).directory
    arguments = (save, holder / "long")
    options = {"longrope_config": config, "tokenizer": tokenizer, **SHARDS}
    with pytest.raises(KeyboardInterrupt):
        write_hf_folder(*arguments, progress=Interrupt(0.6), **options)
    write_hf_folder(*arguments, progress=(calls := Calls()), **options)
    assert calls[0] > 0


def test_an_output_that_is_or_holds_what_is_read_is_refused(untied_gqa, config, exported, tmp_path):
    runs = tmp_path / "runs"
    save = shutil.copytree(untied_gqa.path, runs / "tuned")
    shutil.copytree(exported, save / "hf", ignore=lambda *_: {"README.md", "model.safetensors"})
    tokenizer = runs / "tokenizer"
    shutil.copytree(exported, tokenizer)
    left = shutil.copytree(exported, tmp_path / ".new.converting" / "result")
    for output, sources in (
        (save, {}),
        (runs, {}),
        (save / "hf", {}),  # from which the tokenizer would come
        (tokenizer, {"tokenizer": tokenizer}),
        (tmp_path / "new", {"tokenizer": left}),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"is read; give another --output|Megatron"):
            write_hf_folder(save, output, longrope_config=config, overwrite=True, **sources)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=r"new would delete .*result, which is read"):
        write_checkpoint(left, tmp_path / "new")
    assert (left / "config.json").exists()


@pytest.mark.parametrize(
    "inside", ["latest_checkpointed_iteration.txt", "a/iter_0000001/x", "mp_rank_00/x", "a.distcp"]
)
def test_overwrite_does_not_delete_megatron_checkpoints(untied_gqa, config, tmp_path, inside):
    precious = tmp_path / "runs" / inside
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(ValueError, match="a part of a Megatron checkpoint, and --overwrite would"):
        write_hf_folder(untied_gqa.path, tmp_path / "runs", longrope_config=config, overwrite=True)
    assert precious.exists()


def test_a_note_that_is_called_like_an_iteration_is_replaced(untied_gqa, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "iter_notes.md").touch()
    write_hf_folder(untied_gqa.path, tmp_path / "out", longrope_config=config, overwrite=True)
    assert not (tmp_path / "out" / "iter_notes.md").exists()


def test_a_process_that_ended_between_two_renames_gives_back_what_was_there(tmp_path):
    output = tmp_path / "hf"
    staging = StagingFolder(output)
    staging.lock()
    staging.begin({"a": 1})
    (staging.path / "replaced" / "hf").mkdir(parents=True)
    (staging.path / "replaced" / "hf" / "precious").touch()
    staging.close()
    with pytest.raises(ValueError, match="bad"), staging_folder(output, {"a": 1}):
        raise ValueError("bad")
    assert (output / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_lock_ends_with_its_folder(tmp_path):
    with staging_folder(tmp_path / "x", {}) as staging:
        with (staging.path / "lock").open("w") as lock, pytest.raises(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        staging.put_in_place()
    with staging_folder(tmp_path / "y", {}):
        pass


def test_files_are_told_apart_by_content_or_by_size_and_time(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "file"
    path.write_bytes(b"one")
    first = file_identity([tmp_path])
    assert first[0][0] == "inside/file"
    os.utime(path, ns=(1, 1))
    assert file_identity([tmp_path]) == first
    path.write_bytes(b"two")
    assert file_identity([tmp_path]) != first
    monkeypatch.setattr("megatron_longrope.conversion.staging._HASHED_BYTES", 1)
    large = file_identity([path])
    path.write_bytes(b"six")
    os.utime(path, ns=(1, 1))  # a clock may be too coarse to tell the two apart
    assert file_identity([path]) != large


def test_a_folder_that_appears_during_a_conversion_stays_and_so_does_the_result(
    untied_gqa, config, tmp_path
):
    output = tmp_path / "hf"

    def somebody_else(folder):
        output.mkdir()
        (output / "precious").touch()

    with pytest.raises(ValueError, match="appeared during the conversion; the result is comple"):
        write_hf_folder(
            untied_gqa.path, output, longrope_config=config, check=somebody_else, **SHARDS
        )
    assert (output / "precious").exists()
    assert (tmp_path / ".hf.converting" / "result" / "config.json").exists()
    output.rename(tmp_path / "theirs")
    write_hf_folder(
        untied_gqa.path, output, longrope_config=config, progress=(calls := Calls()), **SHARDS
    )
    assert calls[0] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "theirs"]


def test_the_current_folder_can_be_the_output(untied_gqa, config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report = write_hf_folder(untied_gqa.path, ".", longrope_config=config)
    assert report.output_dir == tmp_path / "here"
    assert (tmp_path / "here" / "config.json").exists()
    monkeypatch.chdir(tmp_path)  # the old folder is gone


@pytest.mark.parametrize("direction", ["to", "from"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    untied_gqa, config, exported, tmp_path, monkeypatch, direction
):
    def convert(output):
        if direction == "to":
            write_hf_folder(untied_gqa.path, output, longrope_config=config)
        else:
            write_checkpoint(exported, output)

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be a folder: .*file is a file; name another one"):
        convert(tmp_path / "file" / "out")
    monkeypatch.setattr("os.path.ismount", lambda path: path.name == "disk")
    with pytest.raises(ValueError, match=r"disk is a mount point, .*; give a folder inside it"):
        convert(tmp_path / "disk")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_a_file_of_a_killed_process_is_not_handed_on(
    untied_gqa, config, tmp_path, interrupted
):
    (interrupted / "result" / ".model.safetensors.k1ll.tmp").write_bytes(b"half")
    assert write_hf_folder(untied_gqa.path, tmp_path / "hf", longrope_config=config, **SHARDS)
    assert not [path.name for path in (tmp_path / "hf").iterdir() if path.name.startswith(".")]
