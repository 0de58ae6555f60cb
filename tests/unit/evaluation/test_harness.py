import importlib.metadata
import json
import math
import os
import random
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
import torch
import torch.distributed as dist
from harness_cases import (
    WORDS,
    assert_same,
    assert_same_scores,
    engine_lm,
    generated,
    hf_model,
    likelihoods,
    rolling,
    run_tasks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import python, spawn

from megatron_longrope.config import FactorSet
from megatron_longrope.data.tokenizer import load_tokenizer
from megatron_longrope.engine import load_engine
from megatron_longrope.evaluation import harness_tasks
from megatron_longrope.evaluation.harness import count_requests
from megatron_longrope.evaluation.harness_tasks import (
    PAPER_TASKS,
    TaskSpec,
    check_tasks,
    parse_tasks,
)

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore:.* requests are longer:UserWarning")

TASKS = Path(__file__).parents[2] / "helpers" / "harness_tasks"
LONG = " ".join(WORDS * 30)  # more tokens than the original window of 64 has
PAIRS = [
    ("", "window"),
    ("", "the window of the context"),
    ("the context", " window"),
    ("the context ", "window"),
    ("the context ", "length of 7"),
    ("the context of", " the"),
    ("\n", "rotary\n"),
    (" ".join(WORDS), " factor search"),
    (LONG, " factor search"),
    (LONG, " segment"),
    ("0", LONG[:100]),
]


def short_lm(engine, tokenizer, **options):
    """As short benchmarks are scored: always with the factors of the original window."""
    return engine_lm(engine, tokenizer, window=maker.ORIGINAL, **options)


def load(path, config=None, **options):
    config = config or maker.longrope_config()
    return load_engine(path, longrope_config=config, hf_parity=True, device="cpu", **options)


@pytest.fixture
def own_config(engine):
    """The engine for a test that swaps its factors."""
    yield engine
    engine.set_config(maker.longrope_config())


@pytest.fixture(scope="module")
def ours(engine, tokenizer_file):
    return short_lm(engine, load_tokenizer(tokenizer_file), batch_size=8)


@pytest.fixture(scope="module")
def theirs(exported):
    """lm-eval's own model of the exported folder, limited to the original window."""
    return hf_model(exported, maker.ORIGINAL)


@pytest.fixture(scope="module", autouse=True)
def task_data(data_sets_are_cached_in_the_test):
    """The tasks name their data relative to their folder."""
    data_sets_are_cached_in_the_test.chdir(TASKS)


def load_one(name, *numbers, include_path=TASKS):
    return check_tasks([TaskSpec(name, *numbers)], include_path=include_path)


def warned(*texts):
    """Texts that do not fit are reported."""
    return pytest.warns(UserWarning, match="lost") if LONG in texts else nullcontext()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_request_scores_as_lm_evals_own_model_of_the_exported_folder_scores_it(
    ours, theirs, pair
):
    with warned(*pair):
        assert_same(likelihoods(ours, [pair]), likelihoods(theirs, [pair]), 1e-4)


@pytest.mark.parametrize("max_length", [2, 17, 40])
def test_a_shorter_maximum_length_cuts_where_lm_evals_own_model_cuts(
    engine, tokenizer_file, theirs, monkeypatch, max_length
):
    lm = short_lm(engine, load_tokenizer(tokenizer_file), max_length=max_length)
    monkeypatch.setattr(theirs, "_max_length", max_length)
    pairs = [(LONG, " the"), ("the context of", " a")]
    pairs = [pair for pair in pairs if len(lm.tok_encode(pair[1])) - 1 <= max_length]
    with pytest.warns(UserWarning, match="lost"):
        assert_same(likelihoods(lm, pairs), likelihoods(theirs, pairs), 1e-4)
    assert rolling(lm, [LONG]) == pytest.approx(rolling(theirs, [LONG]), abs=2e-3)


@pytest.mark.parametrize("text", ["window", " ".join(WORDS * 3), LONG, ""])
def test_a_rolling_likelihood_is_that_of_lm_evals_own_model(ours, theirs, text):
    assert rolling(ours, [text]) == pytest.approx(rolling(theirs, [text]), abs=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"until": ["\n", "."], "max_gen_toks": 12},
        {"until": "e", "max_gen_toks": 20},
        {"until": ["ar"], "max_new_tokens": 30, "do_sample": False, "temperature": 0.7},
        {"max_gen_toks": 1},
        {"until": [], "max_gen_toks": 50},
        {"until": ["."], "max_gen_toks": 9, "num_beams": 1},
    ],
)
@pytest.mark.parametrize("context", ["the window of the", "Answer:", LONG])
def test_greedy_text_is_that_of_lm_evals_own_model(ours, theirs, context, arguments):
    pair = (context, arguments)
    with warned(context):
        assert generated(ours, [pair]) == generated(theirs, [pair])


def test_every_end_token_of_a_folder_ends_a_text_as_in_lm_evals_own_model(
    engine, exported, theirs, tmp_path, monkeypatch
):
    pair = ("the window of the", {"until": [], "max_gen_toks": 30})
    (whole,) = generated(short_lm(engine, load_tokenizer(exported)), [pair])
    end = load_tokenizer(exported).encode(whole)[5]
    folder = shutil.copytree(exported, tmp_path / "instruct")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    monkeypatch.setattr(theirs.model.generation_config, "eos_token_id", [2, end])
    (our_text,) = generated(short_lm(engine, load_tokenizer(folder)), [pair])
    (their_text,) = generated(theirs, [pair])  # with the text of the end: it is no special token
    assert whole.startswith(their_text) and their_text.startswith(our_text)
    assert len(our_text) < len(their_text) < len(whole)


def test_batches_of_one_and_eight_give_the_same_results_in_the_order_of_the_requests(
    engine, tokenizer_file, ours
):
    single = short_lm(engine, load_tokenizer(tokenizer_file), batch_size=1)
    pairs = [*PAIRS, *reversed(PAIRS), *PAIRS[:3]]
    with pytest.warns(UserWarning, match="lost"):
        one_by_one = [likelihoods(single, [pair])[0] for pair in pairs]
        assert_same(likelihoods(ours, pairs), one_by_one, 1e-5)
        assert_same(likelihoods(single, pairs), one_by_one, 1e-5)
    texts = ["window", LONG, " ".join(WORDS), "the\nof"]
    assert rolling(ours, texts) == pytest.approx(rolling(single, texts), abs=1e-5)
    prompts = [(context, {"until": ["e"], "max_gen_toks": 8}) for context, _ in PAIRS[2:8]]
    assert generated(ours, prompts) == [generated(single, [prompt])[0] for prompt in prompts]


@settings(max_examples=15)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24)), min_size=1, max_size=9),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_padding_beside_any_neighbours_leaves_the_log_softmax_of_each_row(
    ours, shapes, batch_size, seed
):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        [torch.randint(maker.VOCAB, (n,), generator=generator).tolist() for n in shape]
        for shape in shapes
    ]
    before, ours.batch_size = ours.batch_size, batch_size
    try:
        found = ours._loglikelihood_tokens([(None, *pair) for pair in pairs])
    finally:
        ours.batch_size = before
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        logits = ours.engine.logits(torch.tensor([context + continuation]))[0]
        rows = logits[len(context) - 1 : -1].log_softmax(-1)
        labels = torch.tensor(continuation)
        assert value == pytest.approx(float(rows.gather(1, labels[:, None]).sum()), abs=1e-4)
        assert greedy is bool((rows.argmax(-1) == labels).all())


def test_equal_requests_are_scored_once(ours, monkeypatch):
    rows = []
    score = ours.engine.score
    monkeypatch.setattr(
        ours.engine, "score", lambda tokens, start: rows.append(len(tokens)) or score(tokens, start)
    )
    likelihoods(ours, [PAIRS[2]] * 5 + [PAIRS[4]])
    assert rows == [2]


def test_only_a_continuation_that_decoding_would_give_is_greedy(ours):
    context = "the window of the"
    (text,) = generated(ours, [(context, {"max_gen_toks": 3})])
    whole = ours.tok_encode(context + text)
    assert len(whole) == len(ours.tok_encode(context)) + 3
    pairs = [(context, text), (context, text + "window"), (context, " window" + text)]
    assert [greedy for _, greedy in likelihoods(ours, pairs)] == [True, False, False]


def test_a_row_of_the_whole_window_and_one_predicted_token_has_the_original_factors(ours):
    """The last token is no input, so that 65 tokens are still a sequence of 64."""
    window = maker.ORIGINAL
    with pytest.warns(UserWarning, match="1 of 1 requests .* window of 64 tokens"):
        ((value, _),) = likelihoods(ours, [(LONG, " segment")])
    tokens = ours.tok_encode(LONG + " segment")[-window - 1 :]
    count = len(ours.tok_encode(" segment", add_special_tokens=False))
    logits = ours.engine.logits(torch.tensor([tokens[:-1]]))[0]
    labels = torch.tensor(tokens[-count:])
    expected = logits.log_softmax(-1)[-count:].gather(1, labels[:, None]).sum()
    assert value == pytest.approx(float(expected), abs=1e-5)
    assert ours.engine.model.rotary_pos_emb.mode == "auto"


def test_names_of_special_tokens_in_a_text_are_text(ours, exported):
    for tokenizer in (ours._text, load_tokenizer(exported)):
        lm = short_lm(ours.engine, tokenizer)
        ids = lm.tok_encode("the </s> of <s>")
        assert ids[0] == tokenizer.bos_id == lm.prefix_token_id
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:])
        assert lm.tok_encode("the", add_special_tokens=False) == tokenizer.encode("the")


def test_bos_is_added_where_the_hugging_face_tokenizer_adds_it(
    ours, exported, tmp_path, tokenizer_file
):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(exported))
    assert (
        short_lm(ours.engine, load_tokenizer(exported)).tok_encode("the")
        == theirs("the")["input_ids"]
    )
    theirs.backend_tokenizer.post_processor = None
    theirs.save_pretrained(tmp_path)
    lm = short_lm(ours.engine, load_tokenizer(tmp_path))
    assert lm.tok_encode("the") == load_tokenizer(tokenizer_file).encode("the")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 4}, "argument num_beams, which .* does not have"),
        (
            {"do_sample": True, "temperature": 0.0},
            "argument do_sample, which .* hf model",
        ),
        ({"temperature": 0.7}, "argument do_sample, which"),
        ({"max_gen_toks": 64}, "64 new tokens .* leave room .* window of 64"),
        ({"max_gen_toks": 0}, "0 new tokens must be at least 1"),
    ],
)
def test_generation_arguments_that_cannot_be_followed_are_refused(ours, arguments, message):
    with pytest.raises(ValueError, match=message):
        generated(ours, [("the", arguments)])


@pytest.mark.parametrize("continuation", ["", LONG])
def test_a_continuation_that_cannot_be_scored_is_refused(ours, continuation):
    with pytest.raises(ValueError, match=r"continuation has \d+ tokens; .* from 1 to the 64"):
        likelihoods(ours, [("the", continuation)])


def test_a_set_beside_the_original_window_changes_nothing(own_config, ours):
    config = maker.longrope_config()
    before = likelihoods(ours, PAIRS[:6])
    middle = FactorSet(100, tuple(2 * value for value in config.factor_sets[0].rescale_factors))
    sets = (config.factor_sets[0], middle, config.factor_sets[1])
    own_config.set_config(replace(config, factor_sets=sets))
    assert likelihoods(ours, PAIRS[:6]) == before


def test_the_engine_is_left_as_it_was_after_a_failure(ours, monkeypatch):
    rotary = ours.engine.model.rotary_pos_emb

    def fail(*_):
        assert rotary.selection.pinned_length == maker.ORIGINAL
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ours.engine, "score", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        likelihoods(ours, PAIRS[:1])
    assert rotary.selection.pinned_length == 0


class Untokened:
    path, bos_id, eos_id = "t.model", None, None


def test_a_tokenizer_without_bos_and_eos_is_refused(ours):
    with pytest.raises(ValueError, match=r"t\.model has neither BOS nor EOS"):
        short_lm(ours.engine, Untokened())


TINY = [("tiny_endings", 0), ("tiny_endings", 3), ("tiny_letters",), ("tiny_texts",)]
TINY += [("tiny_continue",), ("tiny_board",)]


@pytest.mark.parametrize("task", TINY, ids=lambda task: "-".join(map(str, task)))
def test_a_task_scores_as_with_lm_evals_own_model(ours, theirs, task):
    loaded = load_one(*task)
    (mine,), (other,) = (run_tasks(lm, loaded, limit=8) for lm in (ours, theirs))
    assert math.isfinite(mine["value"])
    assert_same_scores(mine, other, rel=1e-4)


def test_a_record_says_how_it_was_measured(ours):
    specs = [TaskSpec("tiny_endings", 2, "acc"), TaskSpec("tiny_board")]
    first, second = run_tasks(ours, check_tasks(specs, include_path=TASKS), limit=5)
    assert (first["task"], first["num_fewshot"], first["metric"]) == ("tiny_endings", 2, "acc")
    assert first["value"] == first["metrics"]["acc"] and "acc_norm" in first["metrics"]
    assert isinstance(first["stderr"], float)
    assert (first["samples"], first["limit"], first["max_length"]) == (5, 5, 64)
    assert first["lm_eval_version"] == importlib.metadata.version("lm_eval")
    assert first["seconds"] > 0
    assert (second["task"], second["metric"], second["samples"]) == ("tiny_board", "acc", 10)
    assert second["num_fewshot"] == 0 and list(second["metrics"]) == ["acc"]


def test_prompts_that_lost_their_beginning_are_counted(ours):
    with pytest.warns(UserWarning, match=r"\d+ of 64 requests are longer than the window of 64"):
        (many,) = run_tasks(ours, load_one("tiny_endings", 8))
    assert 0 < many["truncated"] <= 64
    (none,) = run_tasks(ours, load_one("tiny_endings", 0))
    assert none["truncated"] == 0


def test_loaded_tasks_can_be_measured_again_with_the_same_result(ours):
    loaded = load_one("tiny_endings", 3)
    first, second = (run_tasks(ours, loaded, limit=8)[0] for _ in range(2))
    assert_same_scores(first, second, rel=0)
    assert not loaded[0].content["tasks"]["tiny_endings"].instances  # texts may be long


def test_another_seed_draws_other_examples(ours):
    loaded = load_one("tiny_endings", 1)
    first, second = (run_tasks(ours, loaded, seed=seed)[0] for seed in (1, 2))
    assert first["metrics"] != second["metrics"]


def hashed(ours, folder, name="tiny_endings"):
    (loaded,) = load_one(name, include_path=folder)
    return count_requests(ours._text, loaded, maker.ORIGINAL, limit=2).sha256


SCORER = "def right(doc, results):\n    return {'acc': WORTH, 'acc_norm': worth()}\n"


@pytest.mark.parametrize(("file", "old", "new"), [
    ("tiny_endings.yaml", "doc_to_target: answer", "doc_to_target: 0"),
    ("tiny_endings.yaml", "higher_is_better: true", "higher_is_better: false"),
    ("tiny_endings.yaml", "output_type", """\
filter_list: [{name: first, filter: [{function: take_first}]}]
output_type"""),
    ("scorer.py", "return 1", "return 2"),  # of a function that the named one calls
])  # fmt: skip
def test_a_task_that_is_scored_otherwise_has_another_hash(ours, tmp_path, file, old, new):
    folder = shutil.copytree(TASKS, tmp_path / "one")
    (folder / "scorer.py").write_text(f"{SCORER}WORTH = 0\ndef worth():\n    return 1\n")
    task = folder / "tiny_endings.yaml"
    task.write_text(task.read_text() + "process_results: !function scorer.right\n")
    # From elsewhere, so that all functions are loaded anew and have other addresses.
    other = shutil.copytree(folder, tmp_path / "other")
    before = hashed(ours, folder)
    assert hashed(ours, other) == before
    text = (other / file).read_text()
    assert old in text
    (other / file).write_text(text.replace(old, new))
    assert hashed(ours, other) != before


DRAW = """\
import datasets, numpy, random, torch
def data(**_):
    drawn = [random.random(), numpy.random.rand(), float(torch.rand(1))]
    doc = {"text": "the", "endings": [" of", " window"], "answer": 0, "drawn": drawn}
    return {"test": datasets.Dataset.from_list([doc])}
"""


def test_what_a_task_draws_as_it_loads_is_the_same_in_every_process(ours, tmp_path):
    folder = shutil.copytree(TASKS, tmp_path / "tasks")
    (folder / "draw.py").write_text(DRAW)
    task = folder / "tiny_endings.yaml"
    task.write_text(task.read_text() + "custom_dataset: !function draw.data\n")
    before = hashed(ours, folder)
    hashed(ours, folder, "tiny_texts")  # leaves other states behind
    random.random()
    assert hashed(ours, folder) == before


def test_a_group_that_weighs_its_tasks_otherwise_has_another_hash(ours, tmp_path):
    folder = shutil.copytree(TASKS, tmp_path / "tasks")
    before = hashed(ours, folder, "tiny_board")
    group = folder / "tiny_board.yaml"
    group.write_text(group.read_text().replace("by_size: true", "by_size: false"))
    assert hashed(ours, folder, "tiny_board") != before == hashed(ours, TASKS, "tiny_board")


@pytest.mark.slow
def test_the_scores_are_those_of_lm_evals_simple_evaluate(theirs, ours):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        theirs,
        tasks=["tiny_endings"],
        num_fewshot=3,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )["results"]["tiny_endings"]
    (record,) = run_tasks(ours, load_one("tiny_endings", 3))
    assert record["metrics"] == pytest.approx(
        {name: results[f"{name},none"] for name in ("acc", "acc_norm")}
    )
    assert record["stderr"] == pytest.approx(results["acc_norm_stderr,none"])


def test_task_lists_are_read():
    assert parse_tasks("arc_challenge:25, mytask:0:acc,other,mmlu,hellaswag:0") == (
        TaskSpec("arc_challenge", 25, "acc_norm"),
        TaskSpec("mytask", 0, "acc"),
        TaskSpec("other"),
        TaskSpec("mmlu", 5, "acc"),
        TaskSpec("hellaswag", 0, "acc_norm"),
    )
    assert parse_tasks("mytask::f1") == (TaskSpec("mytask", None, "f1"),)
    assert parse_tasks("paper,mytask") == (*PAPER_TASKS, TaskSpec("mytask"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a:b", "'a:b' is not NAME"),
        ("a:-1", "is not NAME, NAME:FEWSHOT or"),
        ("a:1:acc:2", "is not NAME"),
        (":1", "is not NAME"),
        (" , ", "no task is named"),
        ("paper,mmlu", "mmlu is named twice"),
    ],
)
def test_malformed_task_lists_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(text)


@pytest.fixture
def only_local(monkeypatch):
    """lm-eval's own list takes seconds to read."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    monkeypatch.setattr(harness_tasks, "_task_manager", lambda *_: manager)


@pytest.mark.parametrize(
    "spec, message",
    [
        (("tiny_ending",), r"no task tiny_ending \(similar: tiny_endings.*include path"),
        (("tiny_tag",), "tiny_tag is no task but a tag .* name them: tiny_endings, tiny_letters"),
        (("tiny_folder",), "group tiny_folder has no score of its own; .*: tiny_endings, tiny_te"),
        (("tiny_letters", 5), "tiny_letters allows no few-shot .* 5 are wanted; .*tiny_letters:0"),
        (("tiny_board", 5), "tiny_letters allows no few-shot .* ask for tiny_board:0"),
        (("tiny_endings", 0, "f1"), "no metric f1; choose one of acc, acc_norm"),
        (("tiny_board", 0, "acc_norm"), "no metric acc_norm; choose one of acc$"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_before_any_model(only_local, spec, message):
    with pytest.raises(ValueError, match=message):
        check_tasks([TaskSpec(*spec)])


def test_missing_data_is_told_without_asking_the_network(tmp_path):
    text = (TASKS / "tiny_endings.yaml").read_text().replace("tiny_endings", "absent")
    for source, dataset in (("hub", "nobody/nothing"), ("file", "json")):
        (tmp_path / f"{source}.yaml").write_text(
            text.replace("absent", source)
            .replace("dataset_path: json", f"dataset_path: {dataset}")
            .replace("endings.jsonl", "absent.jsonl")
        )
        message = f"task {source} cannot be loaded: .*; put its data into the .* cache, allow down"
        with pytest.raises(ValueError, match=message) as caught:
            load_one(source, include_path=tmp_path)
        assert (source == "hub") == ("Offline" in str(caught.value))


def test_a_folder_of_tasks_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent is no folder"):
        load_one("tiny_endings", include_path=tmp_path / "absent")


def test_downloads_are_off_while_tasks_load_and_as_before_afterwards(monkeypatch):
    import datasets
    import huggingface_hub

    def state():
        return (
            huggingface_hub.constants.HF_HUB_OFFLINE,
            datasets.config.HF_HUB_OFFLINE,
            os.environ.get("HF_HUB_OFFLINE"),
            os.environ.get("HF_DATASETS_OFFLINE"),
        )

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    before = state()
    with pytest.raises(RuntimeError), harness_tasks.downloads(False):
        assert state() == (True, True, "1", "1")
        raise RuntimeError
    assert state() == before
    with harness_tasks.downloads(True):
        assert state() == before


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r'pip install "megatron-longrope\[eval\]"$'):
        check_tasks(PAPER_TASKS)


@pytest.mark.slow
def test_the_module_imports_without_lm_eval(tmp_path):
    """In another process: this one has imported lm-eval, and the module."""
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys; sys.modules['lm_eval'] = None\n"
        "from megatron_longrope.evaluation.harness_tasks import parse_tasks\n"
        "print(parse_tasks('paper'))"
    )
    done = python(script)
    assert done.returncode == 0 and "truthfulqa_mc2" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.release  # lm-eval reads the files of all its tasks
def test_every_task_of_the_papers_board_is_known_to_lm_eval():
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    assert {spec.name: index[spec.name].kind.name for spec in PAPER_TASKS} == {
        "arc_challenge": "TASK",
        "hellaswag": "TASK",
        "mmlu": "GROUP",
        "truthfulqa_mc2": "TASK",
    }


LAYOUTS = ((1, 1), (2, 1), (1, 2))  # (tensor parallel, context parallel) on two processes
PROMPTS = [(context, {"until": ["e"], "max_gen_toks": 6}) for context, _ in PAIRS[2:8]]


def run_rank(rank, directory, checkpoint, tokenizer):
    """One of two processes: all layouts, one after another."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.chdir(TASKS)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2
    )
    results = {}
    for layout in LAYOUTS:
        engine = load(
            checkpoint, tensor_parallel=layout[0], context_parallel=layout[1], replicas=True
        )
        lm = short_lm(engine, load_tokenizer(tokenizer), batch_size=4)
        (record,) = run_tasks(lm, load_one("tiny_endings", 2))
        results[layout] = {
            "replica": engine.replica,
            "likelihoods": likelihoods(lm, PAIRS),
            "rolling": rolling(lm, [LONG, "window"]),
            "generated": generated(lm, PROMPTS),
            "record": record,
        }
        parallel_state.destroy_model_parallel()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_copies_tensor_and_context_parallelism_change_no_result(
    megatron_runs, tokenizer_file, tmp_path, ours
):
    spawn(run_rank, (str(tmp_path), str(megatron_runs["untied_gqa"].path), str(tokenizer_file)), 2)
    scores, whole = likelihoods(ours, PAIRS), rolling(ours, [LONG, "window"])
    (record,) = run_tasks(ours, load_one("tiny_endings", 2))
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert results[1, 1]["replica"] == (rank, 2)
        for found in results.values():
            assert_same(found["likelihoods"], scores, 1e-4)
            assert found["rolling"] == pytest.approx(whole, abs=1e-3)
            assert found["generated"] == generated(ours, PROMPTS)
            assert_same_scores(found["record"], record, rel=1e-6)


def test_answers_of_one_token_share_the_forward_pass_of_their_question(ours, monkeypatch):
    """As in lm-eval's own model: the four letters of MMLU cost one pass, not four."""
    passes = []
    choices, score = ours.engine.choices, ours.engine.score
    monkeypatch.setattr(
        ours.engine, "choices", lambda t, p, c: passes.append(len(t)) or choices(t, p, c)
    )
    monkeypatch.setattr(ours.engine, "score", lambda t, s: passes.append(len(t)) or score(t, s))
    letters = [
        (("", ""), [1, 20, 30 + question], [40 + k]) for question in range(3) for k in range(4)
    ]
    found = ours._loglikelihood_tokens(letters)
    assert sum(passes) == 3
    passes.clear()
    alone = [ours._loglikelihood_tokens([request])[0] for request in letters]
    assert sum(passes) == 12
    for (value, greedy), (other, other_greedy) in zip(found, alone, strict=True):
        assert value == pytest.approx(other, abs=1e-5) and greedy == other_greedy
