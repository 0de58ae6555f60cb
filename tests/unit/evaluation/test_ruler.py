"""RULER: samples that can be solved and fit, published wording and scores, lm-eval's numbers."""

import ast
import json
import random
import re
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
from evaluated import ruler, save, whose
from harness_cases import hf_model
from hypothesis import given, settings
from hypothesis import strategies as st
from ruler_reader import solve

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet
from megatron_longrope.conversion.to_hf import write_hf_folder
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.engine import generation, load_engine
from megatron_longrope.evaluation.prompts import generated_text
from megatron_longrope.evaluation.ruler.samples import Sampler, largest_fit
from megatron_longrope.evaluation.ruler.sources import read_essays, read_sources, read_words
from megatron_longrope.evaluation.ruler.tasks import TASKS, score

SYLLABLES = ["ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "vu", "we", "yo", "za"]
WORDS = sorted({a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES})
LONG = 1536  # tokens, one for each character


class WordTokenizer:
    """A token for each word and each mark between words."""

    path, bos_id, eos_id, vocab_size = "words", 1, 2, 2**31

    def encode(self, text):
        return [hash(part) % 2**31 for part in re.findall(r"\w+|\W", text)]


def write_squad(path, articles=6):
    """Two paragraphs an article, each with a question; one question has no answer."""

    def paragraph(article, part):
        town, year = f"Town{article}{part}", 1900 + 10 * article + part
        fact = {"question": f"When was {town} built?", "is_impossible": False,
                "answers": [{"text": str(year)}, {"text": f"in {year}"}]}  # fmt: skip
        none = {"question": f"Who built {town}?", "is_impossible": True, "answers": []}
        filler = " ".join(WORDS[100 * article : 100 * article + 40])
        return {"context": f"{town} was built in {year}. {filler}.", "qas": [none, fact]}

    data = [{"paragraphs": [paragraph(k, part) for part in range(2)]} for k in range(articles)]
    path.write_text(json.dumps({"data": data}))
    return str(path)


def write_hotpotqa(path, questions=8):
    """Each question comes with two documents of its own and one that all share."""
    data = [
        {
            "question": f"Which river flows through City{k}?",
            "answer": f"River{k}",
            "context": [
                [f"City{k}", [f"City{k} lies at River{k}. ", " ".join(WORDS[k : k + 30])]],
                [f"River{k}", [f"River{k} is long."]],
                ["Sea", ["All rivers end there."]],
            ],
        }
        for k in range(questions)
    ]
    path.write_text(json.dumps(data))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler")
    rng = random.Random(3)
    (folder / "words.txt").write_text("\n".join(WORDS))
    text = " ".join(
        " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(60)
    )
    (folder / "essay.txt").write_text(text.replace(". ", ".\n\n", 3))
    return {
        "words": str(folder / "words.txt"),
        "essays": str(folder / "essay.txt"),
        "squad": write_squad(folder / "squad.json"),
        "hotpotqa": write_hotpotqa(folder / "hotpotqa.json"),
    }


@pytest.fixture(scope="module")
def sources(files):
    return read_sources([*TASKS.values()], **files)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@settings(max_examples=8, deadline=None)
@given(length=st.sampled_from([1500, 2048, 4096, 9000]), index=st.integers(0, 7),
       seed=st.integers(0, 3))  # fmt: skip
def test_a_sample_can_be_solved_fits_and_fills_its_length(sources, task, length, index, seed):
    sampler = Sampler(WordTokenizer(), sources, seed)
    sample, tokens = sampler.make(task, length, index)
    found = solve(task, sample.prompt)
    assert found <= set(sample.answers) if task.data else found == set(sample.answers)
    assert score(task, " and ".join(found), sample.answers) == 1.0
    assert tokens == [1, *WordTokenizer().encode(sample.prompt)]
    assert len(tokens) + task.num_new_tokens <= length
    # An example's place, whole documents and rare words are the coarsest units.
    assert len(tokens) + task.num_new_tokens > 0.9 * length - 150


@pytest.mark.parametrize(("name", "write"), [("squad", write_squad), ("hotpotqa", write_hotpotqa)])
def test_documents_repeat_where_there_are_no_others(tmp_path, name, write):
    task = TASKS[{"squad": "qa_1", "hotpotqa": "qa_2"}[name]]
    files = dict.fromkeys(("essays", "words", "squad", "hotpotqa"))
    few = read_sources([task], **files | {name: write(tmp_path / "few.json", 1)})
    sample, tokens = Sampler(WordTokenizer(), few, 0).make(task, 4096, 0)
    assert 0.9 * 4096 - 150 < len(tokens) + task.num_new_tokens <= 4096
    assert score(task, sample.prompt, sample.answers) == 1.0


def test_a_sample_depends_on_seed_length_and_number_alone(sources):
    def prompt(seed=1, length=2048, index=3, before=()):
        sampler = Sampler(WordTokenizer(), sources, seed)
        for other in before:
            sampler.make(TASKS["niah_multikey_1"], length, other)
        return sampler.make(TASKS["niah_multikey_1"], length, index)[0].prompt

    assert prompt() == prompt(before=(0, 1, 2))
    assert len({prompt(), prompt(seed=2), prompt(length=2100), prompt(index=4)}) == 4


@settings(max_examples=60, deadline=None)
@given(least=st.integers(1, 30), wording=st.integers(0, 400), unit=st.integers(1, 60),
       noise=st.integers(0, 5), room=st.integers(500, 200_000))  # fmt: skip
def test_a_haystack_is_measured_a_few_times_only(least, wording, unit, noise, room):
    asked = []

    def tokens_of(size):
        asked.append(size)
        return wording + unit * size + random.Random(size).randint(0, noise)

    size, used = largest_fit(tokens_of, room, least)
    if used <= room:
        assert used >= room - room // 200 or tokens_of(size + 1) > room
    assert len(asked) < 40 and used == tokens_of(size)


def constants(module):
    """Every text that a module of lm-eval assigns or holds in a dict; nothing of it is run."""
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "ruler" / f"{module}.py"
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("niah_utils", "niah_multivalue", {"{what}s": "{type_needle_v}"}),
        ("vt_utils", "vt", {"{count}": "{num_v}"}),
        ("cwe_utils", "cwe", {}),
        ("fwe_utils", "fwe", {}),
        ("qa_utils", "qa_1", {}),
    ],
)
def test_the_wording_is_that_of_lm_eval(module, name, words):
    pytest.importorskip("lm_eval")
    theirs = {text.replace("assgined", "assigned") for text in constants(module)}
    prompt, prefix = TASKS[name].wording
    for ours, its_name in words.items():
        prompt, prefix = prompt.replace(ours, its_name), prefix.replace(ours, its_name)
    assert prompt in theirs
    if module == "niah_utils":
        return  # an f-string there
    assert prefix in theirs or prefix.strip() in theirs


def test_one_needle_is_asked_for_in_the_singular(sources):
    """RULER makes the singular by replacing words in the plural."""
    plural, singular = TASKS["niah_multivalue"].wording, TASKS["niah_single_1"].wording
    for many, one in zip(plural, singular, strict=True):
        many = many.replace("Some", "A").replace("are all", "is").replace("are", "is")
        assert many.replace("{what}s", "{what}") == one


HAND_MADE = [
    ("niah_single_1", " 1234567.", ["1234567"], 1.0),
    ("niah_multivalue", "11, 22 and 33", ["11", "22", "33", "44"], 0.75),
    ("vt", "abcde\nFGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 0.4),
    ("cwe", "", ["one"], 0.0),
    ("fwe", "x\x00abcdef", ["abcdef", "ghijkl", "mnopqr"], 1 / 3),
    ("qa_2", "The answer is River3.", ["river3"], 1.0),
    ("qa_2", "River4", ["river3"], 0.0),
]


@pytest.mark.parametrize(("name", "text", "answers", "expected"), HAND_MADE)
def test_answers_are_scored_as_lm_eval_scores_them(name, text, answers, expected):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler.common_utils import process_results, process_results_part

    theirs = process_results_part if TASKS[name].data else process_results
    assert score(TASKS[name], text, answers) == pytest.approx(expected)
    doc = {"max_length": 4096, "outputs": answers}
    assert theirs(doc, [text])["4096"] == pytest.approx(expected)


def test_one_spelling_of_an_answer_suffices():
    """As published; lm-eval's mean over the spellings would be one third."""
    assert score(TASKS["qa_1"], "in 1912", ["1912", "the year 1912", "MCMXII"]) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"essays": None}, "niah_single_2, .*niah_multiquery need --essays"),
        ({"squad": None}, "qa_1 needs --squad"),
        ({"hotpotqa": "squad"}, r"squad.json is not in HotpotQA's format"),
        ({"words": "squad"}, "words, at least 40 are needed"),
    ],
)
def test_what_a_task_lacks_is_named(files, tmp_path, given, message):
    (tmp_path / "few").write_text("one two")
    paths = {**files, "words": files["words"], **{
        name: files.get(value, value) if name != "words" else str(tmp_path / "few")
        for name, value in given.items()
    }}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        read_sources([*TASKS.values()], **paths)


def test_words_and_questions_that_do_not_suffice_are_named(sources):
    sampler = Sampler(WordTokenizer(), sources, 0)
    with pytest.raises(ValueError, match=r"needs more than 1,728 words; give a longer list"):
        sampler.make(TASKS["cwe"], 65536, 0)
    with pytest.raises(ValueError, match=r"qa_2 has 8 questions, fewer than sample 9 needs"):
        sampler.make(TASKS["qa_2"], 2048, 8)
    with pytest.raises(ValueError, match=r"a sample of vt has at least \d+ tokens"):
        sampler.make(TASKS["vt"], 256, 0)


def test_every_question_must_fit_into_every_length_with_its_own_documents(tmp_path):
    pages = [
        [[f"T{place}", f"word {place} " * (150 if place == 3 else 9)]] * 10 for place in range(5)
    ]
    items = [{"question": "q?", "answer": "a", "context": page} for page in pages]
    (tmp_path / "h.json").write_text(json.dumps(items))
    task = TASKS["qa_2"]
    sources = read_sources([task], None, None, str(tmp_path / "h.json"), None)
    sampler = Sampler(WordTokenizer(), sources, 0)
    sampler.check(task, 2048, 3)
    sampler.check(task, 8192, 5)
    with pytest.raises(ValueError, match=r"a sample of qa_2 has at least \d+ tokens .* than 2048"):
        sampler.check(task, 2048, 5)
    with pytest.raises(ValueError, match=r"qa_2 has 5 questions, fewer than sample 6 needs"):
        sampler.check(task, 8192, 6)


def test_a_short_text_is_repeated_word_by_word(tmp_path):
    (tmp_path / "a.txt").write_text("One two three.  Four\nfive six seven. Eight nine.")
    essays = read_essays(str(tmp_path / "a.txt"))
    words = ["One", "two", "three.", "Four", "five", "six", "seven.", "Eight", "nine."]
    for count in (1, 3, 5, 9, 10, 23):
        assert " ".join(essays.first(count)).split() == (words * 3)[:count]


def test_words_are_those_of_wonderwords():
    wonderwords = pytest.importorskip("wonderwords")
    words = read_words(None)
    known = wonderwords.RandomWord()._categories
    assert words.nouns == sorted(known["noun"])
    assert words.adjectives == sorted({*known["adjective"]})
    assert words.all == sorted({*known["noun"], *known["adjective"], *known["verb"]})


def longrope_config():
    factors = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    return maker.longrope_config().with_factor_set(FactorSet(LONG, factors))


@pytest.fixture(scope="module")
def command(tmp_path_factory, megatron_runs, data, files):
    folder = tmp_path_factory.mktemp("command")
    longrope_config().save(folder / "long.json")
    return [
        "eval", "ruler", "--load", str(megatron_runs["untied_gqa"].path), "--longrope-config",
        str(folder / "long.json"), "--tokenizer", data["tokenizer"],
        *(text for name, path in files.items() for text in (f"--{name}", path)),
    ]  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "ruler.jsonl").read_text().splitlines()]


def test_the_command_generates_records_and_goes_on(command, tmp_path, capsys, monkeypatch):
    given = [*command, "--tasks", "niah_single_1,fwe", "--lengths", "1k", "--output", str(tmp_path)]
    assert main([*given, "--samples", "1"]) == 0
    rows = records(tmp_path)
    assert [row["task"] for row in rows] == ["niah_single_1", "fwe"]
    for row in rows:
        assert row["num_tokens"] + TASKS[row["task"]].num_new_tokens <= 1024
    shown = capsys.readouterr().out
    assert "<1k" in shown and "Some averages lack" in shown
    assert main([*given, "--samples", "1"]) == 0
    assert "everything was already measured" in capsys.readouterr().out
    assert len(records(tmp_path)) == 2
    # Whoever repeats the prompt has written the answer.
    monkeypatch.setattr(generation, "generate", lambda engine, tokens, *_, **more: tokens.tolist())
    assert main([*given, "--samples", "2"]) == 0
    assert [row["score"] for row in records(tmp_path)] == [0.0, 0.0, 1.0, 1.0]


def test_too_few_words_for_the_longest_length_are_said_before_weights_are_loaded(
    untied_gqa, data, tmp_path, capsys, no_weights
):
    maker.longrope_config().with_factor_set(FactorSet(16384, (8.0,) * 8)).save(tmp_path / "f.json")
    (tmp_path / "words.txt").write_text("\n".join(WORDS[:60]))
    given = [
        "eval", "ruler", "--load", untied_gqa.path, "--longrope-config", tmp_path / "f.json",
        "--tokenizer", data["tokenizer"], "--words", tmp_path / "words.txt", "--tasks", "cwe",
        "--lengths", "2k,16k", "--output", tmp_path / "out",
    ]  # fmt: skip
    assert main(list(map(str, given))) == 2
    assert "cwe at 16384 tokens needs more than 60 words" in capsys.readouterr().err


def test_the_page_shows_averages_beside_published_ones_and_every_task(tmp_path, capsys):
    rows = [
        ruler(task, length, float(length == 4096 or place % 2), sample) | whose(model)
        for model in ("a", "b")
        for length in (4096, 8192)
        for place, task in enumerate(TASKS)
        for sample in range(2)
    ]
    save(tmp_path, "ruler", rows)
    assert main(["report", str(tmp_path)]) == 0
    averages = (tmp_path / "tables" / "ruler.csv").read_text()
    assert "a,4k,1.0,13 tasks" in averages and f"a,8k,{6 / 13}" in averages
    assert "a,effective,4k," in averages
    assert '"LLaMA3-8B, LongRoPE2 (published)",8k,93.7,' in averages
    assert '"LLaMA3-8B, LongRoPE2 (published)",effective,64k,' in averages
    assert (
        "a,a,checkpoint,,1000,8192,vt,0.0,2,"
        in (tmp_path / "figures" / "ruler_by_task.csv").read_text()
    )


@pytest.fixture(scope="module")
def exported(megatron_runs, data, tmp_path_factory):
    """The checkpoint as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    write_hf_folder(megatron_runs["untied_gqa"].path, folder, longrope_config=longrope_config(),
                  tokenizer=data["tokenizer"])  # fmt: skip
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_multiquery", "qa_2"])  # one of each way to score
def test_samples_score_as_with_lm_evals_tasks_and_hf_model_on_the_exported_folder(
    sources, untied_gqa, exported, data, name
):
    """The prompts are ours, all else is lm-eval's: prompt assembly, generation, scores."""
    pytest.importorskip("accelerate")
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks.ruler import common_utils

    task = TASKS[name]
    engine = load_engine(
        untied_gqa.path, longrope_config=longrope_config(), hf_parity=True, device="cpu"
    )
    tokenizer, without = (load_tokenizer(data["tokenizer"]) for _ in range(2))
    without.bos_id = None  # transformers puts none before a text with this tokenizer
    sampler, docs, prompts, ours = Sampler(without, sources, 5), [], [], []
    for index in range(2):
        sample, tokens = sampler.make(task, LONG, index)
        text, _ = generated_text(engine, tokenizer, tokens, task.num_new_tokens, LONG)
        # An untrained model finds nothing: look for something that it wrote, and something else.
        answers = [text.strip()[3:8], *sample.answers[:1]] if not task.data else [text.strip()[3:8]]
        prompts.append(tokens)
        ours.append((text, score(task, text, answers)))
        docs.append({"input": sample.input, "gen_prefix": sample.answer_prefix,
                     "outputs": answers, "max_length": LONG})  # fmt: skip
    assert {value for _, value in ours} == {1.0 if task.data else 0.5}
    theirs = ConfigurableTask(
        config={
            "task": name, "output_type": "generate_until", "test_split": "test",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
            "doc_to_text": "{{input}}", "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}", "target_delimiter": " ",
            "process_results": common_utils.process_results_part if task.data
            else common_utils.process_results,
            "metric_list": [{"metric": str(LONG), "aggregation": common_utils.aggregate_metrics,
                             "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "temperature": 0.0, "until": [],
                                  "max_gen_toks": task.num_new_tokens},
        }
    )  # fmt: skip
    lm = hf_model(exported, LONG)
    assert [lm.tok_encode(doc["input"] + doc["gen_prefix"]) for doc in docs] == prompts
    results = evaluate(lm=lm, task_dict={name: theirs}, bootstrap_iters=0, log_samples=True)
    written = [entry["resps"][0][0] for entry in results["samples"][name]]
    assert [text.rstrip() for text, _ in ours] == [text.rstrip() for text in written]
    mean = sum(value for _, value in ours) / len(ours)
    assert results["results"][name][f"{LONG},none"] == pytest.approx(mean)
