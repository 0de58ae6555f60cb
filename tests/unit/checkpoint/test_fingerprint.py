"""A checkpoint is known by what its files hold: a copy is the same, a further step is another."""

import shutil

from megatron_longrope.checkpoint.fingerprint import content_sha256


def weights(folder, step):
    folder.mkdir(parents=True)
    for shard in range(2):
        (folder / f"__{shard}_0.distcp").write_bytes(bytes([step + shard]) * 500_000)
    (folder / ".metadata").write_bytes(b"alike")
    return folder


def test_a_copy_is_the_same_model_and_another_step_is_not(tmp_path):
    first = weights(tmp_path / "a" / "iter_0000010", 1)
    copy = shutil.copytree(first, tmp_path / "b" / "iter_0000010")
    assert content_sha256(first) == content_sha256(copy)
    (copy / "README.md").write_text("a card")
    left = copy / ".cache/huggingface/download/__0_0.distcp.metadata"
    left.parent.mkdir(parents=True)
    left.write_text("commit\nhash\n1700000000.0\n")
    shutil.copy(left, copy / ".DS_Store.metadata")
    assert content_sha256(first) == content_sha256(copy)
    assert content_sha256(first) != content_sha256(weights(tmp_path / "c", 2))


def test_a_weight_that_changed_somewhere_in_a_large_file_is_seen(tmp_path):
    folder = weights(tmp_path / "a", 1)
    before = content_sha256(folder)
    content = bytearray((folder / "__1_0.distcp").read_bytes())
    content[::1000] = b"\0" * len(content[::1000])
    (folder / "__1_0.distcp").write_bytes(content)
    assert content_sha256(folder) != before
