import errno
import fcntl

import pytest
from filelock import SoftFileLock

from megatron_longrope.errors import LongRopeError
from megatron_longrope.integration.launcher import hold_folder, save_folder

pytestmark = pytest.mark.one_release


def test_a_second_training_into_a_folder_is_refused_and_named(tmp_path):
    with (tmp_path / ".longrope.lock").open("w") as other:
        other.write("process 7 on a-node")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by process 7 on a-node; wait for"):
            hold_folder(tmp_path, wait=0)
    hold_folder(tmp_path, wait=0)
    hold_folder(tmp_path, wait=0)  # its own
    with (tmp_path / ".longrope.lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_an_earlier_version_left_where_there_is_no_flock_is_a_warning(
    tmp_path, monkeypatch
):
    def no_flock(fd, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with (
        SoftFileLock(tmp_path / ".longrope.lock"),
        pytest.warns(UserWarning, match=r"lock cannot be locked \(no flock there\); make sure"),
    ):
        hold_folder(tmp_path, wait=0)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LongRopeError, match=r"file/deeper cannot be a folder: .*file is a file;"):
        hold_folder(tmp_path / "file" / "deeper", wait=0)
    with pytest.raises(LongRopeError, match=r"file cannot be a folder: .*file is a file; name ano"):
        hold_folder(tmp_path / "file", wait=0)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("--save a", "a"),
        ("--save=a", "a"),
        ("--save a --save-interval 5 --save=b", "b"),
        ("--save", None),
        ("--save-interval 5", None),
        ("--save msc://bucket/a", None),  # an object store has no folder to lock
    ],
)
def test_the_folder_that_is_locked_is_the_one_that_megatron_saves_to(words, folder):
    assert save_folder(words.split()) == folder
