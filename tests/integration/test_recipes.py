"""The recipes in examples/: their commands are those of the programs they call."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/workflow"))
sys.path.insert(0, str(ROOT / "examples"))
import plan  # noqa: E402
import preflight  # noqa: E402
import rehearse  # noqa: E402
from forked_commands import forked_commands  # noqa: E402
from tiny_hf import make_hf_folder  # noqa: E402

from megatron_longrope.cli import build_parser  # noqa: E402
from megatron_longrope.config import FactorSet, LongRopeConfig, identity_config  # noqa: E402
from megatron_longrope.integration.arguments import add_longrope_args  # noqa: E402
from megatron_longrope.methods import METHODS  # noqa: E402
from megatron_longrope.report.expected import read_expected  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.one_release]
RECIPES = ("llama2_7b", "mistral_7b", "llama3_8b")


@cache
def commands(name, *, rehearsal=False, **overrides):
    """Every `longrope` command of a recipe: Snakemake itself says them, in a process of its own."""
    own = (ROOT / "examples" / name / "Snakefile").exists()
    folders = (name,) if own else ("progressive", name)
    files = [ROOT / "examples" / folder / "config.yaml" for folder in folders]
    if rehearsal:
        files += [ROOT / "examples" / folder / "rehearsal.yaml" for folder in folders]
    config = {}
    for path in filter(Path.exists, files):
        config |= yaml.safe_load(path.read_text())
    snakefile = ROOT / "examples" / folders[0] / "Snakefile"
    return plan.list_commands(str(snakefile), config | overrides)


def of_kind(name, kind, **options):
    return [command for command in commands(name, **options) if command.words[1] == kind]


@pytest.fixture(scope="module")
def megatron():
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_longrope_args(arguments.add_megatron_arguments(parser))


# Replaces the same settings in every recipe; all rehearsals are walked through below.
REHEARSAL = {"rehearsal": True, "output": "/absent/out", "hf": "{output}/inputs/hf"}


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in RECIPES), ("llama2_7b", REHEARSAL)]
)
def test_every_command_is_one_that_the_command_line_takes(name, options):
    found = commands(name, **options)
    for command in found:
        try:
            args = build_parser().parse_args(command.words[1:])
        except SystemExit:
            pytest.fail(f"{command.rule}: {' '.join(command.words)}")
        assert args.command == command.words[1]
    kinds = {" ".join(command.words[1:3]) for command in found}
    assert {"convert from-hf", "convert to-hf", "data prepare", "eval ppl", "eval short"} <= kinds
    assert all(command.gpus == 1 for command in found) or not options


def test_the_task_of_a_rehearsal_finds_its_questions_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rehearse.make_task(Path("tasks"))
    files = yaml.safe_load(Path("tasks/rehearsal.yaml").read_text())["dataset_kwargs"]["data_files"]
    assert files == {"test": str(tmp_path / "tasks/questions.jsonl")}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Settings of the papers' tables, whose models are folders, and all commands."""
    config = yaml.safe_load((ROOT / "examples/paper/config.yaml").read_text())
    folder = tmp_path_factory.mktemp("models")
    for name, entry in config["models"].items():
        if "hf" in entry:
            entry["hf"] = str(folder / name)
            (folder / name).mkdir()
    return config, plan.list_commands(str(ROOT / "examples/paper/Snakefile"), config)


def test_the_papers_tables_are_commands_that_the_command_line_takes(paper):
    _, found = paper
    for command in found:
        args = build_parser().parse_args(command.words[1:])
        assert args.command in ("data", "search", "eval", "report")
    # A page for every file of published values, and a row for every model.
    pages = {Path(command.words[2]).name for command in found if command.words[1] == "report"}
    files = {path.stem: read_expected(path) for path in (ROOT / "examples/paper").glob("*/*.csv")}
    assert pages == {*files, "ruler"}
    labels = {word.partition("=")[0] for command in found for word in command.words if "=" in word}
    names = labels | {method.label for method in METHODS.values()}
    assert {item.row for items in files.values() for item in items} <= names


def test_every_model_of_the_papers_tables_is_measured_with_its_own_tokenizer(paper):
    config, found = paper
    families = {name: entry.get("family", name) for name, entry in config["models"].items()}
    assert families["LongRoPE2-LLaMA3-8B"] == "LLaMA3-8B"
    assert all("Mistral" in name for name in families if families[name] == "Mistral-7B")
    assert all("Mistral" in families[name] for name in families if name.startswith("YaRN-Mistral"))
    tokenizers = {}
    for command in found:
        if command.words[1:3] == ("data", "prepare"):
            args = build_parser().parse_args(command.words[1:])
            tokenizers[args.output] = Path(args.tokenizer).name
    for command in found:
        if command.words[1] == "eval":
            values = dict(zip(command.words, command.words[1:], strict=False))
            name = (values.get("--load") or values["--hf"]).partition("=")[0]
            if "--data" in values:
                assert tokenizers[values["--data"]] == families[name]
            else:
                assert Path(values["--tokenizer"]).name in (name, families[name])


def test_a_model_whose_tokenizer_nobody_names_is_refused():
    # Snakemake itself says it, in a process of its own.
    models = {"mine": {"load": "checkpoints/mine"}}
    message = "the model mine of the settings .* set its `family` to the name of a model"
    with pytest.raises(ValueError, match=message):
        plan.list_commands(str(ROOT / "examples/paper/Snakefile"), {"models": models})


def test_rulers_thirteen_tasks_are_refused_without_their_texts():
    config = {"ruler": {"squad": ""}}
    message = "names essays and hotpotqa of essays, squad and hotpotqa.* take the models out"
    with pytest.raises(ValueError, match=message):
        plan.list_commands(str(ROOT / "examples/paper/Snakefile"), config)


# Stands in for `longrope`: finds 23 documents, and writes down what it is to measure.
COMMAND = """#!/usr/bin/env bash
[[ $1 == eval ]] && exec echo "$@" >>called
while [[ $1 != --output ]]; do shift; done
touch "$2.bin" "$2.idx"
echo '{"documents": 23}' >"$2.json"
"""
LONG = FactorSet(2097152, (1.0, 2.0, 300.0, 512.0))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Where some rules of the papers' tables have run, on a toy model."""
    folder = tmp_path_factory.mktemp("tables")
    make_hf_folder(folder / "toy", "mistral", max_position_embeddings=4096, sliding_window=4096)
    identity_config(10000.0, 8, 4096).with_factor_set(LONG).save(folder / "extended.json")
    (folder / "longrope").write_text(COMMAND)
    (folder / "longrope").chmod(0o755)
    (folder / "text.txt").touch()
    settings = {
        "output": str(folder), "gpus": 0,
        "models": {"toy": {"hf": str(folder / "toy"), "flags": "--sliding-window drop"}},
        "perplexity": {"pg19": {"text": str(folder / "text.txt")}},
        "recovery": {"extended": str(folder / "extended.json")},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    targets = ("factors/before_recovery.json", "factors/passkey/toy.json", "pg19/toy.done")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", "examples/paper/Snakefile", "--cores", "1",
         "--configfile", str(folder / "config.json"), "--", *targets],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env={**os.environ, "LONGROPE_BIN": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_before_the_recovery_every_length_has_the_factors_of_the_longest(paper, tables):
    config = LongRopeConfig.load(tables / "factors/before_recovery.json")
    assert config.factor_set_for(4096) == config.factor_set_for(2097152) == LONG
    wanted = [word for command in paper[1] for word in command.words if "before=" in word]
    assert wanted == ["before=factors/before_recovery.json"]


def test_published_models_are_asked_for_passkeys_beyond_their_window_as_they_are(paper, tables):
    from megatron_longrope.evaluation.targets import open_models, targets_at

    toy = open_models([], [f"toy={tables / 'toy'}"], sliding_window="drop")
    with pytest.raises(ValueError, match="4096"):
        targets_at(toy, [], [2097152])
    (target,) = targets_at(toy, [str(tables / "factors/passkey/toy.json")], [2097152])
    assert set(target.config.factor_set_for(2097152).rescale_factors) == {1.0}
    assert target.config.attention_factor_for(2097152) == 1.0
    config, found = paper
    asked = [command.words for command in found if command.words[1:3] == ("eval", "passkey")]
    assert len(asked) == len(config["passkey"]["models"])
    assert all("--longrope-config" in words for words in asked)


def test_a_table_is_measured_on_as_many_documents_as_there_are_up_to_its_number(paper, tables):
    def number(words):
        return words[words.index("--num-documents") + 1]

    assert number((tables / "called").read_text().split()) == "23"
    planned = [c.words for c in paper[1] if c.rule.startswith("perplexity pg19")]
    assert planned and {number(words) for words in planned} == {"100"}


def test_mistrals_factors_of_128k_are_tuned_at_16k_as_those_of_256k(megatron):
    config = {}
    for name in ("progressive/config", "mistral_7b/config", "paper/ft128k_mistral"):
        config |= yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    found = plan.list_commands(str(ROOT / "examples/progressive/Snakefile"), config)
    (training,) = (command for command in found if command.words[1] == "pretrain")
    args, _ = megatron.parse_known_args(training.words[3:])
    assert (args.seq_length, args.train_iters, args.lr) == (16384, 400, 1e-6)
    assert (args.longrope_config, args.longrope_mode) == ("factors/128k.json", "long")
    assert args.context_parallel_size == 1 and args.recompute_granularity is None


def test_the_claims_are_commands_that_the_command_line_takes():
    found = commands("claims")
    for command in found:
        build_parser().parse_args(command.words[1:])
    rules = {command.rule.split()[0] for command in found}
    assert {"untuned", "random_starts", "finetune", "tuned", "recovery", "ablations"} <= rules
    # Claim 4 and 5: every training sees as many tokens as the others, the halves together.
    tokens = {}
    for command in found:
        if command.words[1] == "pretrain":
            flags = dict(zip(command.words, command.words[1:], strict=False))
            sizes = (
                flags[f"--{name}"] for name in ("seq-length", "global-batch-size", "train-iters")
            )
            tokens[Path(flags["--save"]).name] = math.prod(map(int, sizes))
    whole = tokens["longrope_0"]
    for seed in (0, 1):
        for name in ("longrope", "pi", "ntk", "yarn"):
            assert tokens[f"{name}_{seed}"] == whole
        assert tokens[f"half_{seed}"] + tokens[f"progressive_{seed}"] == whole


@pytest.mark.parametrize("name", [*RECIPES, "claims"])  # test_quickstart.py has the quickstart's
def test_every_training_has_an_index_of_samples_that_begin_moves_aside_with_it(name):
    for command in of_kind(name, "pretrain"):
        values = dict(zip(command.words, command.words[1:], strict=False))
        assert values["--data-cache-path"] == f"{values['--save']}.cache"


@pytest.mark.parametrize("name", RECIPES)
def test_megatron_knows_every_flag_of_the_trainings(name, megatron):
    for command in of_kind(name, "pretrain"):
        args, unknown = megatron.parse_known_args(command.words[3:])
        known_from_0_19 = {"--dataloader-inter-document-masking"}
        assert set(unknown) <= known_from_0_19
        assert args.longrope_config and args.longrope_chunked_loss
        assert args.position_embedding_type == "rope"
        # At a time limit it saves a checkpoint: the scripts send this signal.
        assert args.exit_signal_handler and args.exit_signal.name == "SIGUSR1"


def test_the_script_for_clusters_has_the_recipes_model():
    script = (ROOT / "examples/cluster/torchrun/finetune.sh").read_text()
    model = re.sub(r"#.*", "", re.search(r"^model=\((.*?)--seq-length", script, re.M | re.S)[1])
    recipe = yaml.safe_load((ROOT / "examples/llama2_7b/config.yaml").read_text())["model"]
    # `longrope plan` has no tokenizer to count; a training takes its tokenizer's vocabulary.
    recipe.remove("--vocab-size 32000")
    assert sorted(model.split()) == sorted(" ".join(recipe).split())


@pytest.mark.parametrize(
    "name, batch, rate, decay, steps, length",
    [
        # LongRoPE, section 4.1 and appendix A.2
        ("llama2_7b", 32, 2e-5, "linear", [400, 600], [131072, 262144]),
        ("mistral_7b", 64, 1e-6, "constant", [400], [16384]),
        # LongRoPE2, section 4.1: 10B tokens
        ("llama3_8b", 64, 2e-5, "cosine", [1192], [131072]),
    ],
)
def test_trainings_have_the_published_settings(name, batch, rate, decay, steps, length, megatron):
    trainings = [
        megatron.parse_known_args(command.words[3:])[0] for command in of_kind(name, "pretrain")
    ]
    assert [args.train_iters for args in trainings] == steps
    assert [args.seq_length for args in trainings] == length
    for args in trainings:
        assert args.global_batch_size == batch and args.lr == rate
        assert args.lr_decay_style == decay and args.lr_warmup_iters < args.train_iters
        assert args.weight_decay == 0 and args.clip_grad == 1.0


def test_the_second_fine_tuning_goes_on_from_the_first_and_replaces_its_factors(megatron):
    first, second = (
        megatron.parse_known_args(command.words[3:])[0]
        for command in of_kind("llama2_7b", "pretrain")
    )
    assert first.pretrained_checkpoint == "checkpoints/base"
    assert second.pretrained_checkpoint == "checkpoints/128k"
    assert (first.longrope_replace_factors, second.longrope_replace_factors) == (False, True)


def test_searches_have_the_published_sizes():
    from megatron_longrope.cli.flags import read_flags
    from megatron_longrope.factor_search.options import SearchOptions

    searches = {
        command.rule: read_flags(SearchOptions, build_parser().parse_args(command.words[1:]))
        for command in of_kind("llama2_7b", "search")
    }
    near, far = searches["search 256k"], searches["second_search 2048k"]
    assert (near.target_length, far.target_length) == (1 << 18, 1 << 21)
    assert (near.num_samples, far.num_samples) == (5, 3)
    assert (near.parameters().population_size, far.parameters().population_size) == (64, 32)
    # Figure 6 and appendix A.3: cut to 15 iterations of 16 candidates.
    assert far.max_evaluations == 32 + 15 * 16
    # The authors' sqrt(1 + ln 512 / ln 4096), of the farthest window in all three.
    assert float(searches["second_search 512k"].attention_factor) == pytest.approx(
        1.32288, abs=1e-5
    )
    assert far.base_config == "factors/256k.json" and far.context_parallel_size == 8
    assert searches["recover 4k"].base_config == "factors/recovered_8k.json"
    assert searches["second_search 512k"].warm_start is None
    assert far.warm_start == "factors/1024k.json"


def test_the_long_trainings_keep_few_checkpoints(megatron):
    for name in RECIPES:
        for command in of_kind(name, "pretrain"):
            args, _ = megatron.parse_known_args(command.words[3:])
            # Megatron asks for a multiple.
            assert args.save_retain_interval % args.save_interval == 0
            assert args.train_iters / args.save_retain_interval <= 6


@pytest.mark.parametrize(
    "name, fixed",
    # Megatron with Transformer Engine does not mask documents under context parallelism.
    [("llama2_7b", {}), ("mistral_7b", {}), ("llama3_8b", {"context": 1})],
)
def test_trainings_are_within_a_tenth_of_the_layout_that_plan_recommends(name, fixed):
    from megatron_longrope.plan import Cluster, plan_command, rank
    from megatron_longrope.plan.flags import parse
    from megatron_longrope.plan.hardware import parse_gpu

    for command in of_kind(name, "pretrain"):
        chosen = plan_command(command.words, "h100", command.gpus)
        model, training, _ = parse(command.words, command.gpus)
        best = rank(model, training, Cluster(parse_gpu("h100"), command.gpus), fixed)[0]
        assert chosen.fits and chosen.hours <= 1.1 * best.hours, (command.rule, best.short())


def test_the_table_of_costs_has_every_training_and_search():
    table = plan.plan_table(commands("llama2_7b"), "h100")
    assert table.count("yes") == 12 and table.count("not estimated") == 1  # short benchmarks
    # Twenty books at 512k, 1024k and 2048k tokens.
    assert "far_perplexity       58.9 GiB    yes   3.1e+19  4.0 h    60 forward passes" in table
    assert "finetune 256k        47.0 GiB    yes   1.2e+21" in table
    few = plan.plan_table([replace(item, gpus=2) for item in commands("llama2_7b")], "h100")
    assert "2 GPUs are no multiple of its TP x CP = 8" in few


def test_the_plan_is_a_target_of_the_recipe_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", "examples/llama3_8b/Snakefile", "--cores", "1",
         "--quiet", "all", "--config", f"output={tmp_path / 'out'}", "hf={output}/hf",
         "--", "plan"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64 x h100 for every job on GPUs" in done.stdout
    assert "finetune  " in done.stdout
    assert done.stdout.count("not estimated") == 1  # short benchmarks


def test_a_setting_within_the_output_is_planned_by_its_real_path():
    found = commands("llama2_7b", **REHEARSAL)
    assert any(word == "/absent/out/inputs/hf" for command in found for word in command.words)


def test_preflight_only_looks_where_the_plan_does_not_cover_a_flag():
    command = of_kind("llama2_7b", "pretrain")[0]
    ours = replace(command, words=(*command.words, "--use-megatron-fsdp"))
    (found,) = preflight._memory([ours], "h100")
    assert found.verdict == "look" and "has --use-megatron-fsdp, which" in found.text
    words = tuple(word for word in command.words if word != "--swiglu")
    assert preflight._disk([replace(command, words=words)], ROOT).verdict == "look"


def test_preflight_names_everything_that_is_missing(tmp_path):
    config = {"output": str(tmp_path), "gpu": "a100", "device": "--cpu"}
    found = [f for f in preflight.examine(commands("llama2_7b"), config) if f.verdict == "FAIL"]
    assert {"hf", "finetune 128k", "documents search", "segments 256k"} <= {
        f.subject for f in found
    }
    (texts,) = {f.text for f in found if f.subject == "documents search"}
    assert re.search(r"/\S+ does not exist", texts), texts
    (script,) = {f.text for f in found if "pretrain_gpt.py" in f.text}
    assert "`script` of the settings does not exist" in script


SEVEN_B = (
    "longrope pretrain s.py --data-path data/train --train-iters 4 --global-batch-size 32 "
    "--seq-length 4096 --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 "
    "--num-attention-heads 32 --swiglu --vocab-size 32000 --bf16"
)


@pytest.mark.parametrize(
    "flags, forwards",
    [
        ("ppl --load a --data d --num-documents 10", 20),
        ("ppl --load a --data d --num-documents 10 --random-windows 7", 14),
        ("ppl --load a --data d --num-documents 10 --longrope-config f --baselines pi,yarn", 60),
        ("ppl --load a --data d --num-documents 10 --baselines pi,yarn", 40),
        (
            "ppl --load a --hf b --data d --num-documents 10 --longrope-config f "
            "--baselines pi,yarn --attention-factor-policy su,none",
            200,
        ),
        ("passkey --load a=c --load b=d --hf e --tokenizer t --trials 10 --depths 0,1", 120),
    ],
)
def test_an_evaluation_is_planned_with_all_its_models_and_factors(flags, forwards):
    words = f"longrope eval {flags} --lengths 4k,8k --output o"
    found = [plan.Command(text, 1, tuple(text.split())) for text in (words, SEVEN_B)]
    assert f" {forwards} forward passes" in plan.plan_table(found, "h100").splitlines()[1]


@pytest.fixture
def four_texts(tmp_path):
    """A folder with four documents, of 20 to 1500 tokens, and their tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    texts = [json.dumps({"text": "word " * size}) + "\n" for size in (500, 900, 1500, 20)]
    (tmp_path / "text.jsonl").write_text("".join(texts))
    return tmp_path


def look_at_texts(folder, prepare, *others):
    given = f"--tokenizer {folder}/tokenizer --output data/set"
    prepare = f"longrope data prepare {given} {prepare}"
    found = [plan.Command(words, 1, tuple(words.split())) for words in (prepare, *others)]
    findings = preflight.examine(found, {"output": str(folder)})
    (texts,) = [finding for finding in findings if finding.subject == prepare]
    return texts


@pytest.mark.parametrize(
    "least, read, verdict", [(400, 400, "ok"), (2000, 400, "FAIL"), (400, 1000, "FAIL")]
)
def test_preflight_counts_the_documents_that_are_long_enough(four_texts, least, read, verdict):
    texts = look_at_texts(
        four_texts,
        f"--input {four_texts}/text.jsonl --whole-documents --min-length {least}",
        f"longrope search --load base --data data/set --target-length {read} --num-samples 3 "
        "--output f.json",
    )
    assert texts.verdict == verdict, texts
    assert "3 are needed" in texts.text


def test_preflight_asks_for_the_tokens_of_both_sets_of_mixed_windows(four_texts):
    blend = SEVEN_B.replace("data/train", "0.7 data/set 0.3 data/set_short") + " --save-interval 4"
    found = look_at_texts(
        four_texts, f"--input {four_texts}/text.jsonl --segment-length 64 --short-window 32", blend
    )
    assert f"training reads {4 * 32 * 4096:.3g}" in found.text


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_preflight_fails_where_no_document_can_be_read(four_texts, on_error):
    text, wrong = (four_texts / "text.jsonl"), four_texts / "wrong.jsonl"
    wrong.write_text(text.read_text().replace('"text"', '"content"'))
    mix = {"right": {"paths": [text.name]}, "wrong": {"paths": [wrong.name]}}
    path = four_texts / "mix.json"
    path.write_text(json.dumps(mix))
    words = f"--mix {path} --segment-length 64 --on-error {on_error}"
    # All that is needed is in the first source; the second would be missing from the mix.
    found = look_at_texts(four_texts, words)
    assert found.verdict == "FAIL", found
    assert "there is no key 'text' (keys: ['content'])" in found.text
    mix["wrong"]["text_key"] = "content"
    path.write_text(json.dumps(mix))
    assert look_at_texts(four_texts, words).verdict == "ok"


@pytest.mark.release
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RECIPES)
def test_a_rehearsal_walks_through_every_rule(name, tmp_path):
    pytest.importorskip("lm_eval")
    output = tmp_path / "a walk"
    command = ["examples/run.sh", f"rehearse-{name}", str(output)]
    environment = {**os.environ, "PYTHON": sys.executable}
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    with forked_commands() as folder:  # each command would import Megatron otherwise
        forked = environment | {"LONGROPE_BIN": str(folder)}
        done = subprocess.run(command, env=forked, **run, timeout=3500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((output / "hf/config.json").read_text())["rope_scaling"]
    assert (output / "results/report.html").exists()
    again = subprocess.run(command, env=environment, **run, timeout=300)
    assert "Nothing to be done" in again.stdout + again.stderr
