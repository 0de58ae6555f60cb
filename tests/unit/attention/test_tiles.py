"""The ring's kernel: output and logsumexp of one tile."""

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_longrope.attention import tiles

SHAPES = {  # name: (queries, keys, groups, width, width of a value)
    "square": (7, 7, 4, 8, 8),
    "fewer queries": (3, 9, 4, 8, 8),
    "grouped queries": (5, 6, 2, 8, 8),
    "one key head": (6, 6, 1, 8, 8),
    "odd width": (6, 6, 2, 7, 7),
    "narrow values": (6, 4, 2, 8, 5),
    "long": (300, 300, 2, 16, 16),
}


def tile_of(shape, dtype, device="cpu"):
    queries, keys, groups, width, value_width = shape
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = [(2, queries, 4, width), (2, keys, groups, width), (2, keys, groups, value_width)]
    return [torch.randn(*size, generator=generator).to(device, dtype) for size in sizes]


def expected_tile(query, key, value, scale, causal):
    members = query.shape[2] // key.shape[2]
    key, value = (x.double().repeat_interleave(members, dim=2) for x in (key, value))
    scores = torch.einsum("bshd,bthd->bsht", query.double(), key) * scale
    if causal:
        future = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future.to(scores.device)[:, None], -torch.inf)
    output = torch.einsum("bsht,bthd->bshd", scores.softmax(-1), value)
    return output, scores.logsumexp(-1)


def assert_tile(tensors, causal, tolerance):
    ours = tiles.attend_tile(*tensors, 0.3, causal)
    for mine, theirs in zip(ours, expected_tile(*tensors, 0.3, causal), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", ["chosen", "blockwise"])
@pytest.mark.parametrize(
    "name, causal",
    [(name, False) for name in SHAPES]
    + [(name, True) for name, (rows, columns, *_) in SHAPES.items() if rows == columns],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_output_and_logsumexp_equal_a_plain_softmax(monkeypatch, name, dtype, causal, kernel):
    shape = SHAPES[name]
    if kernel == "blockwise":
        monkeypatch.setattr(tiles, "_kernel", lambda *_: tiles._blockwise)
        monkeypatch.setattr(tiles, "_SCORES", 500)  # many blocks of rows
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_tile(tile_of(shape, dtype), causal, tolerance)


def test_the_logsumexp_is_never_in_half_precision():
    for kernel in (tiles._blockwise, tiles._flash_cpu):
        tensors = [x.transpose(1, 2) for x in tile_of(SHAPES["square"], torch.bfloat16)]
        assert kernel(*tensors, 0.3, True)[1].dtype == torch.float32


def test_no_row_block_holds_more_scores_than_its_budget(monkeypatch):
    monkeypatch.setattr(tiles, "_SCORES", 4000)
    sizes = []
    logsumexp = torch.logsumexp
    monkeypatch.setattr(
        torch, "logsumexp", lambda x, **options: sizes.append(x.numel()) or logsumexp(x, **options)
    )
    tensors = [x.transpose(1, 2) for x in tile_of(SHAPES["long"], torch.float32)]
    tiles._blockwise(*tensors, 0.3, True)
    assert len(sizes) == 300 and max(sizes) <= 4000
