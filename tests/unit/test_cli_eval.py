"""`longrope eval`: what the commands measure, and what they refuse before any weight is loaded."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
import torch
from search_data import make_search_data
from tiny_corpus import make_text

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.data.documents import read_documents
from megatron_longrope.data.prepare import prepare
from megatron_longrope.data.segments import FixedSegments, WholeDocuments
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.engine import Answer, Engine, generation, load_engine
from megatron_longrope.engine.generation import generate
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation import passes
from megatron_longrope.evaluation.passkey_prompt import is_retrieved, make_trial
from megatron_longrope.files import hold

LONG = 1024  # the passkey prompt has 340 characters, each a token of this tokenizer


def longrope_config():
    factors = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    return maker.longrope_config().with_factor_set(FactorSet(LONG, factors))


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    path = tmp_path_factory.mktemp("factors") / "long.json"
    longrope_config().save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, megatron_runs, data):
    """The checkpoint as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("hf") / "folder"
    write_hf_folder(
        megatron_runs["untied_gqa"].path,
        path,
        longrope_config=longrope_config(),
        tokenizer=data["tokenizer"],
    )
    return str(path)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(kind, output, *arguments):
    assert main(["eval", kind, "--output", str(output), *map(str, arguments)]) == 0
    return records(output / f"{kind}.jsonl")


def refused(capsys, kind, *arguments):
    assert main(["eval", kind, *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_truncated_perplexity_is_that_of_a_plain_forward(untied_gqa, data, factors, tmp_path):
    rows = evaluate(
        "ppl", tmp_path, "--load", f"m={untied_gqa.path}", "--longrope-config", factors,
        "--data", data["heldout"], "--num-documents", 2, "--lengths", "64,256",
    )  # fmt: skip
    engine = load_engine(untied_gqa.path, longrope_config=longrope_config(), device="cpu")
    for row, length in zip(rows, (64, 256), strict=True):
        documents = read_documents(data["heldout"], min_length=255, limit=2)
        means = []
        for document in documents:
            tokens = torch.tensor([[1, *document[: length - 1]]])
            logits = engine.logits(tokens)[0, :-1].double()
            means.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
        assert row["protocol"] == "truncated" and row["num_windows"] == 2
        assert row["ppl_window_mean"] == pytest.approx(math.exp(sum(means) / 2), rel=1e-5)
        assert row["nll_per_document"] == pytest.approx(means, rel=1e-5)
    with (tmp_path / "ppl.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["length"] for row in table] == ["64", "256"] and table[0]["model"] == "m"


def test_the_short_last_window_of_a_document_has_the_factors_of_its_length(
    untied_gqa, data, factors, tmp_path
):
    text = make_text(1, 400)[: 511 + 50]  # fifty tokens more than a window, a character each
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (row,) = evaluate(
        "ppl", tmp_path, "--load", untied_gqa.path, "--longrope-config", factors,
        "--data", tmp_path / "held.jsonl", "--tokenizer", data["tokenizer"],
        "--num-documents", 1, "--lengths", "512", "--stride", "disjoint",
    )  # fmt: skip
    engine = load_engine(untied_gqa.path, longrope_config=longrope_config(), device="cpu")
    ids = load_tokenizer(data["tokenizer"]).encode(text)
    with engine.pinned(512):
        losses = [engine.nll(torch.tensor([[1, *part]])) for part in (ids[:511], ids[511:])]
    assert row["num_windows"] == 2 and row["num_tokens"] == 561
    mean = torch.cat(losses, dim=1).double().mean().item()
    assert row["ppl_token_weighted"] == pytest.approx(math.exp(mean), rel=1e-6)


def test_a_hugging_face_folder_measures_like_the_checkpoint_it_came_from(
    untied_gqa, data, factors, folder, tmp_path
):
    rows = evaluate(
        "ppl", tmp_path, "--load", f"megatron={untied_gqa.path}", "--hf", f"hf={folder}",
        "--longrope-config", factors, "--data", f"{data['heldout']}.jsonl",
        "--tokenizer", data["tokenizer"], "--num-documents", 1, "--lengths", "256",
        "--stride", "100",
    )  # fmt: skip
    assert [row["model"] for row in rows] == ["megatron", "hf"]
    assert rows[0]["protocol"] == rows[1]["protocol"] == "sliding"
    assert rows[1]["ppl_token_weighted"] == pytest.approx(rows[0]["ppl_token_weighted"], rel=1e-6)
    assert rows[0]["sha256"] == rows[1]["sha256"]


def test_random_windows_of_a_parquet_file_with_the_folders_own_tokenizer(
    folder, data, tmp_path, capsys
):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    texts = [make_text(seed, 400) for seed in range(4)]
    parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "held.parquet")
    given = ("--hf", folder, "--data", tmp_path / "held.parquet", "--num-documents", 4,
             "--lengths", "64,256", "--random-windows", 9)  # fmt: skip
    assert main(["eval", "ppl", "--output", str(tmp_path), *map(str, given)]) == 2
    assert "name the key or column of the text: --text-key" in capsys.readouterr().err
    rows = evaluate("ppl", tmp_path, *given, "--text-key", "content")
    assert [(row["protocol"], row["num_windows"]) for row in rows] == [("random", 9)] * 2
    for row in rows:
        low, high = row["ppl_token_weighted_interval"]
        assert low < row["ppl_token_weighted"] < high
    shown = capsys.readouterr().out
    low, high = rows[0]["ppl_window_mean_interval"]
    assert f"{low:.2f} to {high:.2f}" in shown
    with (tmp_path / "ppl.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["ppl_window_mean_low"]) == low
    # Another seed is another cell, and so is another longest length: it decides the places, too.
    for changed, cells in ((("--seed", 1), 4), (("--lengths", 64), 5)):
        found = evaluate("ppl", tmp_path, *given, "--text-key", "content", *changed)
        assert len({row["sha256"] for row in found}) == len(found) == cells
    assert refused(capsys, "ppl", "--output", tmp_path, *given, "--stride", 8) == (
        "longrope eval: error: --random-windows 9 and --stride 8 are two ways of placing windows; "
        "give one of them\n"
    )


def test_baselines_of_a_model_with_factors_multiply_them(untied_gqa, data, tmp_path, capsys):
    assert main(["eval", "ppl", "--load", str(untied_gqa.path), "--data", data["heldout"],
                 "--num-documents", "1", "--baselines", "pi,yarn", "--lengths", "128,512",
                 "--output", str(tmp_path)]) == 0  # fmt: skip
    assert "baselines multiply its factors for 256 tokens" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ppl.jsonl").read_text().splitlines()]
    cells = {(row["label"], row["length"]): row["ppl_token_weighted"] for row in rows}
    # Within the model's window there is nothing to extend, and one row for all methods.
    assert list(cells) == [("pi", 128), ("pi", 512), ("yarn", 512)]
    engine = load_engine(untied_gqa.path)
    own = maker.longrope_config()
    engine.set_config(own)
    (document,) = read_documents(data["heldout"], min_length=511, limit=1)
    tokens = torch.tensor([[1, *document[:511]]])
    expected = engine.nll(tokens[:, :128]).double().mean().exp().item()
    assert cells["pi", 128] == pytest.approx(expected, rel=1e-5)
    doubled = tuple(2.0 * value for value in own.factor_sets[1].rescale_factors)
    engine.set_config(own.with_factor_set(FactorSet(512, doubled)))
    expected = engine.nll(tokens).double().mean().exp().item()
    assert cells["pi", 512] == pytest.approx(expected, rel=1e-5)


def test_a_second_command_measures_only_what_is_new(untied_gqa, data, factors, tmp_path, capsys):
    common = (
        "--load", untied_gqa.path, "--longrope-config", factors, "--data", data["heldout"],
        "--num-documents", 1,
    )  # fmt: skip
    first = evaluate("ppl", tmp_path, *common, "--lengths", "64")
    both = evaluate("ppl", tmp_path, *common, "--lengths", "64,128")
    assert both[0] == first[0] and [row["length"] for row in both] == [64, 128]
    before = (tmp_path / "ppl.jsonl").read_bytes()
    evaluate("ppl", tmp_path, *common, "--lengths", "64,128")
    assert "everything was already measured" in capsys.readouterr().out
    assert (tmp_path / "ppl.jsonl").read_bytes() == before


def test_two_commands_that_write_the_same_records_exclude_each_other(
    untied_gqa, data, factors, tmp_path, capsys
):
    held = hold(tmp_path / ".ppl.lock", "", "")
    error = refused(
        capsys, "ppl", "--load", untied_gqa.path, "--longrope-config", factors,
        "--data", data["heldout"], "--num-documents", 1, "--lengths", "64", "--output", tmp_path,
    )  # fmt: skip
    held.release()
    assert "ppl.jsonl is being written by process" in error
    assert "wait for it or give another --output" in error


def test_a_perplexity_that_was_killed_costs_only_the_windows_that_are_left(
    untied_gqa, data, factors, tmp_path, capsys, monkeypatch
):
    arguments = (
        "--load", untied_gqa.path, "--longrope-config", factors, "--data", data["heldout"],
        "--num-documents", 1, "--lengths", "64", "--stride", 32,
    )  # fmt: skip
    add = passes.Passes.add

    def dies_after_two(self, number, result):
        add(self, number, result)
        if len(self.results) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(passes, "_INTERVAL", 0.0)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(passes.Passes, "add", dies_after_two)
        evaluate("ppl", tmp_path, *arguments)
    assert (said := re.search("ppl: ([0-9,]+) forward passes", capsys.readouterr().out))
    (row,) = evaluate("ppl", tmp_path, *arguments)
    assert said[1] == f"{row['num_windows']:,}"
    assert f"ppl: {row['num_windows'] - 2:,} forward passes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("kind", ["ppl", "passkey"])
def test_another_bos_or_eos_is_another_cell_though_the_flags_are_the_same(
    untied_gqa, data, factors, tmp_path, kind, name
):
    """A tokenizer's hash is that of what decides the ids of a text, which no special token does."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(data["tokenizer"], folder)
    given = {
        "ppl": ("--data", f"{data['heldout']}.jsonl", "--num-documents", 1, "--lengths", 64),
        "passkey": ("--lengths", 512, "--trials", 1, "--scoring", "generate"),
    }[kind]
    found = []
    for token in ("<s>", "</s>"):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        changed = json.dumps(settings | {f"{name}_token": token})
        (folder / "tokenizer_config.json").write_text(changed)
        found.append(evaluate(
            kind, tmp_path, "--load", untied_gqa.path, "--longrope-config", factors,
            "--tokenizer", folder, *given,
        ))  # fmt: skip
    assert len(found[1]) == (1 if (kind, name) == ("ppl", "eos") else 2)
    if len(found[1]) == 2:
        assert [str(row[name]) for row in found[1]] == ["1", "2"]
        with (tmp_path / f"{kind}.csv").open() as file:
            assert [row[name] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_folder_without_bos_is_measured_with_its_own_tokenizer(
    untied_gqa, factors, folder, tmp_path
):
    data = make_search_data(tmp_path, bos=False)
    model = shutil.copytree(folder, tmp_path / "hf")
    shutil.copytree(data["tokenizer"], model, dirs_exist_ok=True)
    common = ("--hf", model, "--lengths", "512")
    text = ("--data", f"{data['heldout']}.jsonl", "--num-documents", 1)
    (row,) = evaluate("ppl", tmp_path, *common, *text)
    assert row["bos"] == "none" and row["num_tokens"] == 511
    tokens = torch.tensor(load_tokenizer(data["tokenizer"]).encode(make_text(5, 400))[:512])[None]
    engine = load_engine(untied_gqa.path, longrope_config=longrope_config(), device="cpu")
    assert row["nll_per_document"][0] == pytest.approx(engine.nll(tokens).mean().item(), rel=1e-5)

    rows = evaluate("ppl", tmp_path, *common, *text, "--bos", 1)
    assert [item["bos"] for item in rows] == ["none", 1]
    tokens = torch.cat([torch.tensor([[1]]), tokens[:, :-1]], dim=1)
    expected = engine.nll(tokens).mean().item()
    assert rows[1]["nll_per_document"][0] == pytest.approx(expected, rel=1e-5)

    (trial,) = evaluate("passkey", tmp_path, *common, "--trials", 1)
    assert trial["bos"] == "none" and trial["num_tokens"] == 512


@pytest.fixture
def known_answers(monkeypatch):
    """Right up to 512 tokens, beyond wrong in the last one; losses of 1, 2, ... nats."""

    def answer(engine, tokens, count):
        *first, last = tokens[0, -count:].tolist()
        return Answer([*first, last + (tokens.shape[1] > 512), 1], [*range(1, count + 1)])

    monkeypatch.setattr(Engine, "answer", answer)


def test_passkey_trials_are_exactly_as_long_as_asked_for(
    untied_gqa, data, factors, tmp_path, capsys, known_answers
):
    rows = evaluate(
        "passkey", tmp_path, "--load", untied_gqa.path, "--longrope-config", factors,
        "--tokenizer", data["tokenizer"], "--lengths", "512,1k", "--depths", "3", "--trials", 2,
    )  # fmt: skip
    assert len(rows) == 2 * 3 * 2
    assert all(row["num_tokens"] == row["length"] for row in rows)
    assert sorted({row["requested_depth"] for row in rows}) == [0.0, 0.5, 1.0]
    for row in rows:
        assert row["correct"] is (row["length"] == 512)
        assert row["nll"] == (row["num_answer_tokens"] + 1) / 2
    assert "split between tokens" in capsys.readouterr().out  # the tokenizer's report
    with (tmp_path / "passkey.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 and {row["trials"] for row in table} == {"2"}


def test_generated_answers_are_judged_by_the_papers_parse_under_the_factors_of_their_length(
    untied_gqa, data, factors, tmp_path, monkeypatch
):
    """The answer may leave the sequence a few tokens shorter, within the set below."""
    tokenizer = load_tokenizer(data["tokenizer"])

    def writes(engine, tokens, *words, **more):
        if more.get("factor_length") != 515:
            return generate(engine, tokens, *words, **more)
        key = re.search(r"key is (\d+)", tokenizer.decode(tokens[0].tolist()))[1]
        return [tokenizer.encode(f" {key}. 7")]

    monkeypatch.setattr(generation, "generate", writes)
    rows = evaluate(
        "passkey", tmp_path, "--load", untied_gqa.path, "--longrope-config", factors,
        "--tokenizer", data["tokenizer"], "--lengths", "512,515", "--trials", 1,
        "--scoring", "generate",
    )  # fmt: skip
    assert [row["correct"] for row in rows] == [False, True]
    for row in rows:
        assert row["scoring"] == "generate" and row["nll"] is None
        assert len(row["text"]) <= 10 and row["num_tokens"] <= row["length"]


@pytest.mark.parametrize("trial", range(3))
def test_teacher_forcing_passes_exactly_when_greedy_decoding_writes_the_answer(
    untied_gqa, data, trial
):
    """On the engine itself: with the answer that it would write, and with the real one."""
    tokenizer = load_tokenizer(data["tokenizer"])
    engine = load_engine(untied_gqa.path, longrope_config=longrope_config(), device="cpu")
    asked = make_trial(tokenizer, 512, depth=0.5, seed=0, trial=trial)
    count = asked.num_answer_tokens
    (new,) = generate(engine, torch.tensor([asked.prompt_tokens]), count + 1, factor_length=1024)
    for answer in (new[:count], asked.answer):
        tokens = torch.tensor([[*asked.prompt_tokens, *answer]])
        found = engine.answer(tokens, count)
        assert (found.predicted[:count] == answer) == (answer == new[:count])
    assert found.predicted[:count] != asked.answer
    assert not is_retrieved(found.predicted, asked, tokenizer)


def test_needles_are_asked_for_in_every_task_length_and_depth(
    untied_gqa, data, factors, tmp_path, capsys, known_answers
):
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("".join(f"The window of row {n} is closed.\n" for n in range(200)))
    (books / "b.jsonl").write_text("no JSON\n")  # not read, because one document is enough
    for source, most in ((books, 1), (data["heldout"], 10)):  # fewer than 10 fill the length
        rows = evaluate(
            "needle", tmp_path, "--load", untied_gqa.path, "--longrope-config", factors,
            "--tokenizer", data["tokenizer"], "--data", source, "--lengths", "1k",
            "--depths", "0,1", "--trials", 1, "--num-documents", most,
        )  # fmt: skip
    # A space or ", " of losses 1 or 9 and 10 comes before each number.
    assert {(row["task"], row["recall"], row["nll"]) for row in rows} == {
        ("single", 0.0, 5.0), ("multi_key", 0.0, 5.0), ("multi_query", 0.5, 9.5),
    }  # fmt: skip
    assert len(rows) == 12 and all(row["num_tokens"] == 1024 for row in rows)
    assert "Needle perplexity" in capsys.readouterr().out
    assert (tmp_path / "needle.csv").read_text().count("\n") == 7


@pytest.mark.parametrize(
    ("kind", "made_by", "bad"),
    [
        ("passkey", "passkey_prompt.make_trial", {"depth": 1.0, "trial": 0}),
        ("needle", "needle_sample.make_sample", {"depth": 1.0, "trial": 1}),
    ],
)
def test_a_prompt_that_cannot_be_made_is_told_before_weights_are_loaded(
    untied_gqa,
    data,
    factors,
    tmp_path,
    no_weights,
    capsys,
    monkeypatch,
    kind,
    made_by,
    bad,
):
    def refuse(*given, **more):
        if bad.items() <= more.items() and given[1 if kind == "passkey" else 3] == 1000:
            raise LongRopeError("a count that this tokenizer skips")

    monkeypatch.setattr(f"megatron_longrope.evaluation.{made_by}", refuse)
    source = ("--data", data["heldout"]) if kind == "needle" else ()
    error = refused(
        capsys, kind, "--load", untied_gqa.path, "--longrope-config", factors, *source,
        "--tokenizer", data["tokenizer"], "--lengths", "512,1000", "--depths", "0,1",
        "--trials", 2, "--output", tmp_path,
    )  # fmt: skip
    assert "a count that this tokenizer skips" in error


def test_short_benchmarks_are_measured_once_and_alike_from_both_formats(
    untied_gqa, data, factors, folder, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    shutil.copytree(Path(__file__).parents[1] / "helpers" / "harness_tasks", tasks)
    monkeypatch.chdir(tasks)  # their data files are named relative to it
    arguments = (
        "--load", f"megatron={untied_gqa.path}", "--hf", f"hf={folder}",
        "--longrope-config", factors, "--tokenizer", data["tokenizer"],
        "--tasks", "tiny_endings:1,tiny_letters", "--include-path", tasks, "--limit", 4,
    )  # fmt: skip
    rows = evaluate("short", tmp_path, *arguments)
    assert [(row["model"], row["task"]) for row in rows] == [
        ("megatron", "tiny_endings"), ("megatron", "tiny_letters"),
        ("hf", "tiny_endings"), ("hf", "tiny_letters"),
    ]  # fmt: skip
    assert all(row["max_length"] == maker.ORIGINAL and row["samples"] == 4 for row in rows)
    for ours, theirs in zip(rows[:2], rows[2:], strict=True):
        assert ours["metrics"] == theirs["metrics"]
    shown = capsys.readouterr().out
    assert "4 questions" in shown and "forward passes of up to" in shown  # the cost
    before = (tmp_path / "short.jsonl").read_bytes()
    evaluate("short", tmp_path, *arguments)
    assert (tmp_path / "short.jsonl").read_bytes() == before
    # A task is another one when a right answer has changed, which no request holds.
    questions = tasks / "letters.jsonl"
    questions.write_text(questions.read_text().replace('"answer": 2', '"answer": 1', 1))
    rows = evaluate("short", tmp_path, *arguments)
    assert [row["task"] for row in rows[4:]] == ["tiny_letters"] * 2
    limited = ("--output", tmp_path / "more", *arguments, "--max-hours", "1e-9")
    assert main(["eval", "short", *map(str, limited)]) == 2
    assert "which is above --max-hours 1e-09; give --yes" in capsys.readouterr().err


# Bad input, before the model is loaded


def test_what_is_wrong_with_the_input_is_said_before_weights_are_loaded(
    untied_gqa, data, factors, folder, tmp_path, capsys, no_weights
):
    output = ("--output", tmp_path / "out")
    load = ("--load", untied_gqa.path, "--longrope-config", factors)
    heldout = ("--data", data["heldout"])
    beyond = refused(capsys, "ppl", *load, *heldout, "--lengths", "2k", *output)
    assert "sequence length 2048 exceeds 1024" in beyond
    few = refused(capsys, "ppl", *load, *heldout, "--lengths", "1k", "--num-documents", 9, *output)
    assert "documents of at least 1023 tokens, 9 needed" in few
    tokenizer = ("--tokenizer", data["tokenizer"])
    short = refused(capsys, "passkey", *load, *tokenizer, "--lengths", "64", *output)
    assert "too short for the passkey prompt" in short
    none = refused(capsys, "passkey", *load, "--lengths", "512", *output)
    assert "prompts need a tokenizer" in none
    other = tmp_path / "other"
    shutil.copytree(data["tokenizer"], other)
    swapped = (other / "tokenizer.json").read_text().replace('"H":', '"?":', 1)
    (other / "tokenizer.json").write_text(swapped.replace('"e":', '"H":', 1))
    prepare([f"{data['heldout']}.jsonl"], tmp_path / "set", other, WholeDocuments())
    theirs, few = ("--hf", folder, "--lengths", 512, *output), ("--num-documents", 1)
    for kind, given in (
        ("passkey", ("--tokenizer", other)),
        ("ppl", ("--data", f"{data['heldout']}.jsonl", "--tokenizer", other, *few)),
        ("ppl", ("--data", tmp_path / "set", *few)),
    ):
        said = refused(capsys, kind, *theirs, *given)
        assert f"reads 'Hello world' as other tokens than the tokenizer in {folder}; it" in said
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text("{")  # why another one is given
    said = refused(capsys, "passkey", "--hf", broken, *tokenizer, "--lengths", "64", *output)
    assert "too short for the passkey prompt" in said
    code = refused(
        capsys, "needle", *load, *tokenizer, "--data", f"{data['heldout']}.jsonl",
        "--lengths", "9k", *output,
    )  # fmt: skip
    assert "exceeds 1024" in code
    assert not (tmp_path / "out").exists()
    (tmp_path / "notes.txt").write_text("mine")
    where = ("--lengths", "1k", "--output", tmp_path / "notes.txt")
    assert "notes.txt is a file" in refused(capsys, "ppl", *load, *heldout, *where)
    segments = tmp_path / "segments"
    prepare([f"{data['heldout']}.jsonl"], segments, data["tokenizer"], FixedSegments(128, "pack"))
    training = refused(capsys, "ppl", *load, "--data", segments, "--lengths", "64", *output)
    assert "is a set for training, whose entries have BOS and EOS" in training
    essays = tmp_path / "essays.jsonl"
    essays.write_text('{"content": "Text."}\n')
    keyed = refused(
        capsys, "ruler", *load, *tokenizer, "--lengths", "1k", "--tasks", "niah_single_2",
        "--essays", essays, *output,
    )  # fmt: skip
    assert "call the key or column of the text `text`" in keyed and "--text-key" not in keyed
    lost = ("--attention-factor-policy", "su", "--lengths", "1k", *output)
    assert "give --baselines" in refused(capsys, "ppl", *load, *heldout, *lost)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("ruler", "--tasks", ","), "',' names nothing; choose among niah_single_1"),
        (("ruler", "--tasks", "vt,vt"), "'vt' is named twice; name it once"),
        (("ppl", "--data", "x", "--baselines", ""), "'' names nothing; choose among"),
        (("ppl", "--data", "x", "--baselines", "yarn,yarn"), "'yarn' is named twice"),
    ],
)
def test_a_choice_names_something_and_nothing_twice(capsys, given, message):
    with pytest.raises(SystemExit):
        main(["eval", *given, "--load", "x", "--lengths", "4k", "--output", "y"])
    assert message in capsys.readouterr().err


def test_depths_are_how_many_a_list_or_random(capsys):
    from megatron_longrope.evaluation.options import parse_depths

    assert parse_depths("random") == [None]
    assert parse_depths("3") == [0.0, 0.5, 1.0]
    assert parse_depths("0,0.25") == [0.0, 0.25]
    assert parse_depths("1.0") == [1.0] and parse_depths("0.0") == [0.0]
    for text in ("1", "0", "7,8", "0,2", "x", "0,0", ""):
        with pytest.raises(SystemExit):
            main(["eval", "passkey", "--load", "x", "--lengths", "4k", "--output", "y",
                  "--depths", text])  # fmt: skip
        assert "give how many, at least 2, or a list" in capsys.readouterr().err
