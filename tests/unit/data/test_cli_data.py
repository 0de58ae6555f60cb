import argparse
import json
import re

import pytest

from megatron_longrope.cli import data
from megatron_longrope.errors import LongRopeError


def longrope(*words):
    parser = argparse.ArgumentParser(prog="longrope")
    data.add_parser(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args(["data", *map(str, words)])
    return args.run(args) or 0


def test_prepare_and_inspect_work_in_sequence(corpus, model_path, tmp_path, capsys):
    prefix = tmp_path / "set"
    prepare = ("prepare", "--input", corpus, "--tokenizer", model_path, "--output", prefix)
    assert longrope(*prepare, "--segment-length", "1k", "--tail", "pack") == 0
    assert "segments of 1024 tokens (tails: pack)" in capsys.readouterr().out
    assert longrope("inspect", prefix) == 0
    output = capsys.readouterr().out
    assert "check: all entries match the manifest" in output
    assert re.search(r"1k to 2k +\d+ #+", output)
    path = tmp_path / "set.json"  # as the release before wrote it
    path.write_text(json.dumps({**json.loads(path.read_text()), "cut": "sentences"}))
    assert longrope("inspect", prefix) == 0
    assert "(tails: pack, cut at sentence ends)" in capsys.readouterr().out


def test_whole_documents_flags_reach_the_set(corpus, model_path, tmp_path, capsys):
    prefix = tmp_path / "held_out"
    prepare = ("prepare", "--input", corpus, "--tokenizer", model_path, "--output", prefix)
    whole = ("--whole-documents", "--min-length", "100", "--max-length", "200")
    assert longrope(*prepare, *whole, "--max-documents", "2") == 0
    expected = "2 whole documents of at least 100 tokens, truncated to 200, the first 2 at most"
    assert expected in capsys.readouterr().out
    assert longrope("inspect", prefix) == 0


def test_inspect_exits_with_1_when_a_segment_is_misaligned(corpus, model_path, tmp_path, capsys):
    prefix = tmp_path / "set"
    prepare = ("prepare", "--input", corpus, "--tokenizer", model_path, "--output", prefix)
    longrope(*prepare, "--segment-length", "64")
    stored = bytearray((tmp_path / "set.bin").read_bytes())
    stored[0] = 77
    (tmp_path / "set.bin").write_bytes(bytes(stored))
    assert longrope("inspect", prefix) == 1
    output = capsys.readouterr().out
    assert "problem: entry 0 starts with token 77, not bos_id 1" in output
    assert "check: failed" in output


def test_skipped_lines_are_printed(corpus, model_path, tmp_path, capsys):
    corpus.write_text(corpus.read_text() + "broken\n")
    prefix = tmp_path / "set"
    prepare = ("prepare", "--input", corpus, "--tokenizer", model_path, "--output", prefix)
    longrope(*prepare, "--whole-documents", "--on-error", "skip")
    output = capsys.readouterr().out
    assert "corpus.jsonl:13: not valid JSON" in output
    assert output.startswith("preparing: 1/1 MB, 0 s")
    assert "  source  " in output and "  input  " not in output  # one source is all of it


def test_a_mix_with_sets_beside_it_is_prepared_and_inspected(corpus, model_path, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("window", "needle"))
    mix, prefix = tmp_path / "mix.json", tmp_path / "set"
    sources = {"a": {"paths": ["corpus.jsonl"]}, "b": {"paths": ["other.jsonl"], "weight": 2}}
    mix.write_text(json.dumps(sources))
    prepare = ("prepare", "--mix", mix, "--tokenizer", model_path, "--output", prefix)
    more = ("--tail", "pack", "--joined", "2", "--held-out", "0.2")
    assert longrope(*prepare, "--segment-length", "128", *more, "--short-window", "64") == 0
    output = capsys.readouterr().out
    assert "entries of 256 tokens, each 2 consecutive segments of 128 tokens" in output
    mixed = r"b +12 documents, .* tokens; in the mix: \d+ documents, .* tokens, \d+\.\d % \(before"
    assert re.search(mixed, output)
    assert f"beside it: {prefix}_heldout\nbeside it: {prefix}_short\n" in output
    for suffix in ("", "_heldout", "_short"):
        assert longrope("inspect", f"{prefix}{suffix}") == 0
    output = capsys.readouterr().out
    assert "documents of at most 64 tokens, filled up to multiples of 16" in output
    assert "documents of b by length (tokens)" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--segment-length", "4k", "--short-multiple", "8"), "only with --short-window"),
        (("--segment-length", "4k", "--mix", "m.json"), "not allowed with argument --input"),
        (
            ("--mix", "m.json", "--whole-documents", "--max-documents", "2"),
            "--max-documents would take the first documents of a --mix",
        ),
        ((), "one of the arguments --segment-length --whole-documents is required"),
        (("--segment-length", "4x"), "length '4x' is not a positive integer"),
        (("--segment-length", "4k", "--whole-documents"), "not allowed with"),
        (("--segment-length", "4k", "--min-length", "1k"), "no meaning with --segment-length"),
        (("--whole-documents", "--tail", "pad"), "no meaning with --whole-documents"),
        (("--whole-documents", "--max-documents", "0"), "'0' is not a positive integer"),
    ],
)
def test_bad_usage_is_refused_with_a_reason(flags, message, capsys):
    inputs = () if "--mix" in flags[:1] else ("--input", "a")
    with pytest.raises((SystemExit, LongRopeError)) as stopped:
        longrope("prepare", *inputs, "--tokenizer", "b", "--output", "c", *flags)
    assert message in capsys.readouterr().err + str(stopped.value)
