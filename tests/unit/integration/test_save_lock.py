import fcntl

import pytest

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
