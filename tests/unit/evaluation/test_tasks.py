"""`longrope eval tasks`: lm-evaluation-harness' tasks inside and beyond the original window."""

import csv
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
from harness_cases import (
    WORDS,
    assert_same_scores,
    engine_lm,
    generated,
    hf_model,
    likelihoods,
    rolling,
    run_tasks,
)

from megatron_longrope.cli import main
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.evaluation.harness_tasks import check_tasks, parse_tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("data_sets_are_cached_in_the_test")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
output_type: {kind}
test_split: test
{more}
"""
TASKS = {  # name: type and the rest of the YAML file
    "long_choice": ("multiple_choice", """\
doc_to_text: "{{text}}:"
doc_to_choice: "{{endings}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]"""),
    "long_letters": ("multiple_choice", """\
doc_to_text: "{{text}} Answer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]"""),
    "long_texts": ("loglikelihood_rolling", """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]"""),
    "long_continue": ("generate_until", """\
doc_to_text: "{{text}} the"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]"""),
}  # fmt: skip
NUM_WORDS = (2, 5, 40, 200, 4, 150)  # within the window of 64 tokens with an answer, or far beyond
NAMES = ",".join(TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """YAML files and their data."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "text": " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(count)),
            "endings": [f" {WORDS[i]} {WORDS[i + 1]}", f" {WORDS[i + 2]}"],
            "answer": i % 2,
        }
        for i, count in enumerate(NUM_WORDS)
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, more) in TASKS.items():
        text = TASK.format(name=name, folder=path, kind=kind, more=more)
        (path / f"{name}.yaml").write_text(text)
    return path


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    path = tmp_path_factory.mktemp("factors") / "factors.json"
    maker.longrope_config().save(path)
    return path


@pytest.fixture(scope="module")
def theirs(exported):
    """lm-eval's own model of the exported folder, up to the extended window."""
    return hf_model(exported, maker.TARGET)


@pytest.fixture
def command(megatron_runs, factors, tokenizer_file, folder):
    return [
        "eval", "tasks", "--load", f"m={megatron_runs['untied_gqa'].path}", "--longrope-config",
        str(factors), "--tokenizer", str(tokenizer_file), "--include-path", str(folder),
    ]  # fmt: skip


def measure(command, output, *more):
    assert main([*command, "--output", str(output), *map(str, more)]) == 0
    return [json.loads(line) for line in (output / "tasks.jsonl").read_text().splitlines()]


def scores_of(lm, folder):
    return run_tasks(lm, check_tasks(parse_tasks(NAMES), include_path=folder))


# Parity, on both sides of the original window


def test_every_type_of_task_scores_as_with_lm_evals_own_model_of_the_exported_folder(
    command, theirs, folder, tmp_path, capsys
):
    rows = measure(command, tmp_path, "--tasks", NAMES)
    for row, other in zip(rows, scores_of(theirs, folder), strict=True):
        assert_same_scores(row, other, rel=1e-4)
        assert row["window"] == "by length" and row["truncated"] == 0
        assert row["shortest"] < maker.ORIGINAL < 2 * maker.ORIGINAL < row["longest"]
        assert set(row["factor_sets"]) == {str(maker.ORIGINAL), str(maker.TARGET)}
        assert sum(row["factor_sets"].values()) == row["requests"]
    assert [row["requests"] for row in rows] == [12, 6, 6, 6]  # letters share a forward pass
    assert [row["higher_is_better"] for row in rows] == [True, True, False, True]  # bits per byte
    shown = capsys.readouterr().out
    assert "30 forward passes" in shown and "6 questions" in shown
    with (tmp_path / "tasks.csv").open() as file:
        assert [line["task"] for line in csv.DictReader(file)] == list(TASKS)
    before = (tmp_path / "tasks.jsonl").read_bytes()
    measure(command, tmp_path, "--tasks", NAMES)
    assert (tmp_path / "tasks.jsonl").read_bytes() == before


def test_requests_of_any_length_are_those_of_lm_evals_own_model(engine, tokenizer_file, theirs):
    ours = engine_lm(engine, load_tokenizer(tokenizer_file))
    texts = [" ".join(WORDS[k % 9] for k in range(count)) for count in (3, 59, 61, 62, 63, 64, 150)]
    pairs = [(text, end) for text in texts for end in (" of the window", " rotary")]
    for (value, greedy), (other, same) in zip(
        likelihoods(ours, pairs), likelihoods(theirs, pairs), strict=True
    ):
        assert value == pytest.approx(other, abs=2e-4) and greedy is same
    assert rolling(ours, texts) == pytest.approx(rolling(theirs, texts), abs=2e-3)
    prompts = [(texts[-1], {"until": ["e"], "max_gen_toks": 12})]
    assert generated(ours, prompts) == generated(theirs, prompts)


@pytest.mark.parametrize(
    ("family", "name", "metadata", "row"),
    [
        (
            "longbench2", "longbench2_govt_single", None,
            {"context": " ".join(WORDS * 8), "question": "rotary", "choices": WORDS[:4],
             "answer": "B"},
        ),
        (
            "infinitebench", "infinitebench_passkey", None,
            {"id": 1, "context": " ".join(WORDS * 9), "input": "window", "answer": ["7"],
             "options": []},
        ),
        (
            "babilong", "babilong_qa1", {"max_seq_lengths": "1k"},
            {"input": " ".join(WORDS * 2), "question": "rotary", "target": "window"},
        ),
    ],
    ids=["LongBench v2", "InfiniteBench", "BABILong"],
)  # fmt: skip
def test_lm_evals_own_long_benchmarks_score_as_with_its_own_model(
    engine, tokenizer_file, theirs, monkeypatch, family, name, metadata, row
):
    """By their YAML files and functions; the rows are made up, in the data sets' columns."""
    import datasets
    import lm_eval

    rows = datasets.Dataset.from_list([row, {**row, "context": "factor", "input": "factor"}])
    splits = datasets.DatasetDict(train=rows, passkey=rows)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split=None, **__: splits if split is None else rows
    )
    folder = Path(lm_eval.__file__).parent / "tasks" / family
    loaded = check_tasks(parse_tasks(name), include_path=folder, metadata=metadata)
    ours = engine_lm(engine, load_tokenizer(tokenizer_file))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* requests are longer than the window")
        (mine,), (other,) = (run_tasks(lm, loaded) for lm in (ours, theirs))
    assert_same_scores(mine, other, rel=1e-6)
    assert mine["samples"] == 2


def test_a_task_that_runs_what_the_model_writes_is_refused(folder, tmp_path):
    text = (folder / "long_continue.yaml").read_text().replace("long_continue", "program")
    (tmp_path / "program.yaml").write_text(f"{text}unsafe_code: true\n")
    with pytest.raises(ValueError, match="program runs code that the model writes, which is ref"):
        check_tasks(parse_tasks("program"), include_path=tmp_path)


# Which factors


def test_a_pinned_window_gives_every_sequence_its_factors(engine, tokenizer_file):
    text = load_tokenizer(tokenizer_file)
    pairs = [("the window of", " the length"), (" ".join(WORDS * 3), " factor search")]
    own = likelihoods(engine_lm(engine, text), pairs)
    pinned = likelihoods(engine_lm(engine, text, window=maker.TARGET), pairs)
    config = engine.config
    engine.set_config(replace(config, factor_sets=config.factor_sets[1:]))
    try:
        alone = likelihoods(engine_lm(engine, text), pairs)
    finally:
        engine.set_config(config)
    assert pinned == alone
    assert pinned[0] != own[0]


def test_generation_is_pinned_by_prompt_and_room_for_the_answer(
    engine, tokenizer_file, monkeypatch
):
    from megatron_longrope.engine import generation

    pinned, original = [], generation.generate
    monkeypatch.setattr(
        generation, "generate",
        lambda *given, **more: pinned.append(more["factor_length"]) or original(*given, **more),
    )  # fmt: skip
    text = load_tokenizer(tokenizer_file)
    lm = engine_lm(engine, text)
    length = len(lm.tok_encode("the window"))
    for new in (maker.ORIGINAL - length, maker.ORIGINAL - length + 1):
        generated(lm, [("the window", {"until": [], "max_gen_toks": new})])
    generated(engine_lm(engine, text, window=100), [("the", {"max_gen_toks": 2})])
    assert pinned == [maker.ORIGINAL, maker.ORIGINAL + 1, 100]


def test_a_pass_has_no_more_tokens_than_a_batch_of_the_original_window(
    engine, tokenizer_file, monkeypatch
):
    shapes, score = [], engine.score
    monkeypatch.setattr(
        engine, "score", lambda tokens, start: shapes.append(tokens.shape) or score(tokens, start)
    )
    lm = engine_lm(engine, load_tokenizer(tokenizer_file), batch_size=4)
    tokens = [([1] * n, [2 + n % 7, 3]) for n in (240, 241, 120, 121, 50, 51, 52, 53, 54)]
    lm._loglikelihood_tokens([(None, *pair) for pair in tokens])
    assert [shape[0] for shape in shapes] == [1, 1, 2, 4, 1]
    assert Counter(n for n, _ in shapes for _ in range(n))[4] == 4


# Prompts beyond the window


def test_a_prompt_beyond_the_window_is_refused_before_a_weight_is_loaded(
    command, tmp_path, capsys, no_weights
):
    given = [*command, "--tasks", "long_continue", "--output", str(tmp_path)]
    assert main([*given, "--window", "100"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after lm-eval's progress bar
    assert "task long_continue: a prompt with its answer has" in error
    assert "more than the window of 100; give factors or a window" in error
    assert "--long-prompts truncate" in error


def test_truncated_prompts_keep_their_end_as_in_lm_eval_and_are_counted_everywhere(
    command, theirs, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(theirs, "_max_length", 100)
    options = ("--max-length", 100, "--long-prompts", "truncate")
    with pytest.warns(UserWarning, match="longer than the window of 100"):
        rows = measure(command, tmp_path, "--tasks", NAMES, *options)
    assert [row["truncated"] for row in rows] == [4, 8, 0, 2]  # texts are cut into windows
    for row, other in zip(rows, scores_of(theirs, folder), strict=True):
        assert_same_scores(row, other, rel=1e-4)
        assert row["longest"] <= 100
    assert "2 truncated" in capsys.readouterr().out
    with (tmp_path / "tasks.csv").open() as file:
        table = {line["task"]: line["truncated"] for line in csv.DictReader(file)}
    assert table["long_letters"] == "8" and table["long_texts"] == "0"


def test_another_window_or_other_data_is_another_column(command, folder, tmp_path, capsys):
    one = ("--tasks", "long_letters", "--limit", 2)
    measure(command, tmp_path, *one)
    rows = measure(command, tmp_path, *one, "--window", maker.TARGET)
    assert [row["window"] for row in rows] == ["by length", maker.TARGET]
    rows = measure(command, tmp_path, "--tasks", "long_letters:0:acc", "--limit", 3)
    assert len(rows) == 3 and len({row["requests_sha256"] for row in rows}) == 2
    rows = measure(command, tmp_path, *one, "--metadata", '{"n": 1}')
    assert [row["metadata"] for row in rows] == [None, None, None, '{"n": 1}']
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "window by length" in page and "window 256" in page and "no metadata" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--window", "512"], "sequence length 512 exceeds 256"),
        (["--max-length", "512"], "--max-length 512 must be from 2 to the window of 256 tokens"),
        (["--max-length", "1"], "--max-length 1 must be from 2"),
        (["--window", "100", "--max-length", "101"], "101 must be from 2 to the window of 100"),
        (["--limit", "0"], "--limit 0 leaves no question"),
        (["--limit", "nan"], "--limit nan leaves no question"),
        (["--limit", "inf"], "--limit inf leaves no question"),
        (["--seed", "-1"], "--seed -1 must be from 0 to 4294967295"),
    ],
)
def test_settings_that_contradict_are_refused_before_a_weight_is_loaded(
    command, tmp_path, capsys, no_weights, given, message
):
    whole = [*command, "--tasks", "long_letters", "--output", str(tmp_path), *given]
    assert main(whole) == 2
    assert message in capsys.readouterr().err
    if "--window" not in given:
        assert main([*whole[:1], "short", *whole[2:]]) == 2
        assert message.replace("of 256", "of 64") in capsys.readouterr().err


def test_metadata_must_be_a_json_object(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "x", "--output", str(tmp_path), "--metadata", "64k"])
    assert "'64k' is no JSON object; write for example" in capsys.readouterr().err


def test_metadata_reaches_the_task(folder, tmp_path):
    loaded = check_tasks(
        parse_tasks("long_letters"), include_path=folder, metadata={"max_seq_lengths": "64k"}
    )
    (leaf,) = loaded[0].content["tasks"].values()
    assert leaf.config.metadata["max_seq_lengths"] == "64k"
