"""`longrope search` says what is wrong with its input before it loads any weight."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import make_megatron_checkpoint as maker
import pytest
import torch
from search_data import make_search_data
from tiny_hf import make_hf_folder

from megatron_longrope.cli import build_parser, main
from megatron_longrope.cli.flags import read_flags
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.engine import Engine
from megatron_longrope.factor_search import runner, session
from megatron_longrope.factor_search.options import SearchOptions
from megatron_longrope.factor_search.samples import needles_or_reason, read_samples
from megatron_longrope.factor_search.session import num_journaled


@pytest.fixture
def options(untied_gqa, data, tmp_path):
    return [
        "search", "--load", str(untied_gqa.path), "--data", data["search"],
        # The checkpoint carries factors for 64 and 256 tokens.
        "--base-config", "none", "--target-length", "256", "--original-length", "64",
        "--num-samples", "3",
        "--output", str(tmp_path / "factors.json"),
    ]  # fmt: skip


def parsed(words):
    return read_flags(SearchOptions, build_parser().parse_args(words))


def parameters(flags):
    command = "search --load x --data y --target-length 8k --output z.json"
    return parsed(f"{command} {flags}".split()).parameters()


def test_the_evolutions_defaults_are_the_papers_and_halve_from_512k_on():
    short = parameters("--algorithm evolution")
    assert short.total_evaluations == 1344 and short.num_parents == 32
    long = parameters("--algorithm evolution --target-length 512k")
    assert (long.population_size, long.num_mutations, long.num_crossovers) == (32, 8, 8)


def test_flags_override_single_numbers_of_the_algorithm():
    ours = parameters("--algorithm evolution --population-size 12 --iterations 3")
    assert (ours.population_size, ours.max_iterations, ours.num_mutations) == (12, 3, 16)
    assert ours.num_parents == 12
    cma = parameters("--max-evaluations 50 --num-samples 4 --windows-per-document 2")
    assert (cma.max_evaluations, cma.num_samples) == (50, 8)
    assert parameters("--target-length 1024k").max_evaluations == 168


FACTORS = Path(__file__).parents[2] / "examples/smollm2_135m/longrope_16k.json"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--iterations 3", "--iterations has no meaning with --algorithm cma"),
        ("--algorithm evolution --initial-deviation 0.1", "no meaning with --algorithm evolution"),
        ("--algorithm evolution --population-size 2", "population_size is 2, below the 3"),
        ("--objective needle", "give their --tokenizer"),
        ("--objective needle --windows-per-document 2", "no meaning with --objective needle"),
        ("--num-samples 9", "9"),
        ("--target-length 64", "nothing to search"),
        ("--target-length 32", "below the original window 64"),
        ("--start-tokens 0,x", "must be integers"),
        ("--space full --critical-dimension 3", "no meaning in the full space"),
        ("--critical-dimension 8", "floor_dimension is 8; it must be below"),
        ("--patience 0", "patience is 0"),
        ("--needle-weight 0", "--needle-weight 0.0 must be above 0"),
        ("--objective joint", "--objective joint writes text into documents"),
        ("--space critical --critical-dimension 99", "must be below rotary_dim / 2 = 8"),
        ("--needle-weight 0.5", "--needle-weight has no meaning with --objective ppl"),
        ("--objective needle --needle-weight 0.5", "--needle-weight has no meaning with --obj"),
        ("--needle-depths 0,1", "--needle-depths has no meaning with --objective ppl"),
        ("--target-length 254 --context-parallel-size 2", "length 254 is not divisible by 2 x"),
        ("--lookahead -1", "lookahead is -1"),
        ("--attention-factor big", "must be a finite number above 0, or `longest`"),
        ("--attention-factor nan --dry-run", "must be a finite number above 0"),
        ("--space critical --start-tokens paper", "cannot be searched in the critical space"),
        (f"--output {__file__}/F.json", "is a file; name another one"),
        ("--attention-factor longest", "plain RoPE has none"),
        ("--max-evaluations 0", "max_evaluations is 0"),
        ("--seed -1", "rng_seed is -1"),
        ("--output .", "--output . is a directory"),
        (f"--output {FACTORS} --resume", "exists without its journal"),
        ("--output out-v1.2", "--output out-v1.2 must end in .json: journal and figures"),
        ("--dry-run --gpu abacus", "abacus"),
        ("--dry-run --gpus 3 --context-parallel-size 2", "not a multiple"),
    ],
)
def test_bad_input_is_one_sentence(options, no_weights, capsys, flags, message):
    assert main([*options, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_needle_search_refuses_another_tokenizer(options, no_weights, capsys, tmp_path):
    other = make_search_data(tmp_path)["tokenizer"]
    path = Path(other, "tokenizer.json")
    changed = json.loads(path.read_text())
    changed["model"]["vocab"]["~~"] = 200
    path.write_text(json.dumps(changed))
    assert main([*options, "--objective", "needle", "--tokenizer", other]) == 2
    assert "is not the tokenizer that" in capsys.readouterr().err


def copy_of_set(prefix, copy, **manifest):
    """A prepared set under another name, with other words in its manifest."""
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", f"{copy}.{suffix}")
    known = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{copy}.json").write_text(json.dumps({**known, **manifest}))
    return str(copy)


def test_a_set_of_another_tokenizer_is_refused_before_any_weight_is_loaded(
    options, data, no_weights, capsys, tmp_path
):
    other = copy_of_set(data["heldout"], tmp_path / "other", tokenizer_sha256="0" * 64)
    assert main([*options, "--held-out", other]) == 2
    assert "were made with different tokenizers" in capsys.readouterr().err
    large = copy_of_set(data["heldout"], tmp_path / "large", vocab_size=maker.VOCAB + 1)
    for flag in ("--held-out", "--data"):
        assert main([*options, flag, large]) == 2
        assert f"has {maker.VOCAB + 1} tokens, the vocabulary of" in capsys.readouterr().err


def test_a_set_of_another_tokenizer_than_a_hugging_face_folders_own_is_refused(
    data, no_weights, capsys, tmp_path
):
    folder = tmp_path / "hf"
    make_hf_folder(folder, "llama", vocab_size=maker.VOCAB)
    shutil.copytree(data["tokenizer"], folder, dirs_exist_ok=True)
    command = [
        "search", "--hf", str(folder), "--data", data["search"], "--held-out", data["heldout"],
        "--target-length", "256", "--num-samples", "3", "--output", str(tmp_path / "f.json"),
        "--dry-run",
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    stored = json.loads((folder / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]  # as many tokens, which mean other text
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"the tokenizer of {data['search']} reads 'Hello world' as other tokens" in error
    # Of a set whose tokenizer is gone nobody knows, as in `eval`; each set is looked at.
    moved = copy_of_set(data["search"], tmp_path / "moved", tokenizer=str(tmp_path / "gone"))
    assert main([*command, "--data", moved]) == 2
    assert f"the tokenizer of {data['heldout']} reads" in capsys.readouterr().err
    assert main([*command, "--data", moved, "--held-out", moved]) == 0
    assert main([*command, "--data", moved, "--tokenizer", data["tokenizer"]]) == 2
    assert f"the tokenizer of {moved} reads" in capsys.readouterr().err


def test_a_winner_outlives_a_failure_on_held_out_text(options, data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(session.outcome_files, "scores_on", fail)
    with pytest.raises(RuntimeError, match="NCCL"):
        main([*options, "--max-evaluations", "4", "--held-out", data["heldout"]])
    (*_, found) = LongRopeConfig.load(tmp_path / "factors.json").factor_sets
    assert found.max_length == 256 and found.origin["search_perplexity"] > 1


def test_references_that_ran_out_of_memory_are_scored_again_on_resume(
    options, tmp_path, capsys, monkeypatch
):
    small = ["--max-evaluations", "4", "--no-figures", "--retrieval-trials", "0"]
    with monkeypatch.context() as patch:

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        patch.setattr(Engine, "nll", fail)
        assert main([*options, *small]) == 2
    error = capsys.readouterr().err
    assert "factors.journal.jsonl" in error and "--context-parallel-size" in error
    assert main([*options, *small, "--resume"]) == 0
    # What the references were scored anew with is kept, too.
    before = (tmp_path / "factors.journal.jsonl").read_bytes()
    assert main([*options, *small, "--resume"]) == 0
    assert (tmp_path / "factors.journal.jsonl").read_bytes() == before


def die(*_, **__):
    raise KeyboardInterrupt


def test_a_discarded_journal_does_not_come_back_when_the_new_search_dies_early(
    options, tmp_path, capsys, monkeypatch
):
    small = ["--max-evaluations", "4", "--no-figures", "--retrieval-trials", "0"]
    assert main([*options, *small]) == 0
    assert num_journaled(tmp_path / "factors.journal.jsonl") == 4
    monkeypatch.setattr(runner, "score_trial", die)
    assert main([*options, *small, "--overwrite"]) == 130
    assert "0 evaluations are in" in capsys.readouterr().err
    assert num_journaled(tmp_path / "factors.journal.jsonl") == 0


def test_whatever_a_journal_was_begun_with_is_compared_when_it_is_resumed(
    options, data, megatron_runs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runner, "score_trial", die)
    begun = "--objective joint --target-length 640 --start-tokens 0,4 --retrieval-trials 0"
    assert main([*options, *begun.split(), "--tokenizer", data["tokenizer"]]) == 130
    maker.longrope_config().save(tmp_path / "base.json")  # for a second search
    other = ["--base-config", str(tmp_path / "base.json"), "--data", data["heldout"],
             "--load", str(megatron_runs["tied_mha"].path)]  # fmt: skip
    changed = (
        "--target-length 512 --algorithm evolution --lookahead 1 --space critical --upper 3 "
        "--seed 1 --num-samples 1 --windows-per-document 2 --patience 9 --bos 5 "
        "--tokens-per-forward 640 --dtype bfloat16 --racing off --retrieval-trials 0 --resume"
    )
    capsys.readouterr()
    assert main([*options, *other, *changed.split()]) == 2
    told = (
        capsys.readouterr().err.partition("was written with other settings: ")[2].split("; ")[:-1]
    )
    named = {part.partition(":")[0].partition(".")[0] for part in told}
    assert " ".join(sorted(named)) == (
        "algorithm attention base bos checkpoint_sha256 critical_dimensions data_sha256 dtype "
        "floor_dimension lookahead needle_weight needles num_samples objective parameters patience "
        "racing references seed space stage start_tokens target_length tokens_per_forward "
        "upper windows_per_document"
    )


def test_a_first_search_runs_under_longropes_attention_factor_whatever_its_base_names(
    options, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner, "score_trial", die)
    plain = replace(identity_config(50000.0, 16, 64), attention_factor_policy="yarn")
    plain.save(tmp_path / "base.json")
    words = ["--base-config", str(tmp_path / "base.json"), "--retrieval-trials", "0"]
    assert main([*options, *words]) == 130
    with (tmp_path / "factors.journal.jsonl").open() as journal:
        attention = json.loads(next(journal))["settings"]["attention"]
    # From 64 to 256 tokens; YaRN's would be 0.1 ln 4 + 1.
    assert attention == [pytest.approx(math.sqrt(1 + math.log(4) / math.log(64))), "su"]


def test_an_evolution_goes_on_with_more_iterations_and_not_with_fewer(options, tmp_path, capsys):
    sizes = ["--algorithm", "evolution", "--population-size", "4", "--num-mutations", "2",
             "--num-crossovers", "2", "--no-figures", "--retrieval-trials", "0"]  # fmt: skip
    journal = tmp_path / "factors.journal.jsonl"
    assert main([*options, *sizes, "--iterations", "1"]) == 0
    before = journal.read_bytes()
    assert main([*options, *sizes, "--iterations", "2", "--resume"]) == 0
    assert journal.read_bytes().startswith(before) and num_journaled(journal) == 4 + 2 * 4
    origin = LongRopeConfig.load(tmp_path / "factors.json").factor_sets[-1].origin
    assert origin["parameters"]["max_iterations"] == 2
    assert main([*options, *sizes, "--iterations", "1", "--resume"]) == 2
    assert "holds 12 evaluations and this search ends after 8" in capsys.readouterr().err


def test_that_retrieval_will_not_be_measured_is_said_before_the_search(options, no_weights, capsys):
    assert main([*options, "--dry-run"]) == 0  # 256 characters are too few for a needle's text
    assert "retrieval will not be measured: " in capsys.readouterr().out


def test_a_dry_run_says_what_the_search_costs_without_loading_it(
    options, no_weights, capsys, tmp_path
):
    (tmp_path / "factors.json").write_text("{}")  # which only a real run would replace
    assert main([*options, "--dry-run", "--gpu", "h100", "--gpus", "8", "--mfu", "0.5"]) == 0
    lines = capsys.readouterr().out
    for part in ("FLOP", "336 evaluations", "GiB", "8 GPUs", "50% of peak"):
        assert part in lines, lines


@pytest.mark.parametrize(
    "flag", ["--gpus", "--tensor-model-parallel-size", "--context-parallel-size"]
)
def test_a_number_of_gpus_is_positive(options, capsys, flag):
    with pytest.raises(SystemExit):
        main([*options, "--dry-run", flag, "0"])
    assert f"argument {flag}: '0' is not a positive integer" in capsys.readouterr().err


def test_a_dry_run_assumes_the_checkpoints_own_type(options, no_weights, capsys):
    assert main([*options, "--dry-run"]) == 0
    assert "memory per GPU in float32" in capsys.readouterr().out
    assert main([*options, "--dry-run", "--dtype", "bfloat16"]) == 0
    assert "memory per GPU in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        "--start-tokens 0,4",
        "--algorithm evolution --population-size 5 --num-mutations 2 --num-crossovers 2 "
        "--iterations 1 --start-tokens 0",
        "--space critical --objective needle --needle-depths 0,1 --target-length 640",
        "--space full --objective joint --start-tokens paper --target-length 640 --patience 50 "
        "--tokens-per-forward 640",
    ],
)
def test_a_search_leaves_factors_with_their_provenance_figures_and_a_table(
    options, data, capsys, tmp_path, flags
):
    more = ["--max-evaluations", "12", "--held-out", data["heldout"],
            "--tokenizer", data["tokenizer"]]  # fmt: skip
    assert main([*options, *more, *flags.split()]) == 0
    output = capsys.readouterr().out
    assert "held-out text" in output and "longrope" in output
    # All four methods have a row, without a gap; 256 characters are too few for a needle's text.
    table = [line for line in output.splitlines() if line.startswith(("pi ", "ntk ", "yarn "))]
    assert len(table) == 3 and not any(" - " in f"{line} " for line in table)
    asked = "--target-length 640" in flags
    assert ("needle loss" in output) == asked != ("retrieval was not measured" in output)
    config = json.loads((tmp_path / "factors.json").read_text())
    found = config["factor_sets"][-1]
    origin = found["origin"]
    assert found["max_length"] in (256, 640) and len(found["rescale_factors"]) == 8
    assert origin["seed"] == 0 and origin["evaluations"] >= 9
    assert origin["search_perplexity"] <= min(origin["seed_perplexity"].values())
    assert set(origin["held_out_perplexity"]) == {"pi", "ntk", "yarn", "longrope"}
    if asked:
        assert origin["retrieval"]["written"]["trials"] == 3
        assert origin["retrieval"]["asked_in"] == "the held-out documents"
    assert len(origin["data_sha256"]) == len(origin["held_out_sha256"]) == 64
    assert origin["versions"]["torch"] and origin["checkpoint"]
    assert origin["sample_forwards"] <= 12 * 3
    figures = {path.name for path in (tmp_path / "factors_figures").iterdir()}
    assert {"factors_search_progress.png", "factors_rescale_factors.csv"} <= figures
    if flags != "--start-tokens 0,4":  # what follows tells the same with any flags
        return
    # The same again: not without being told, and then nothing is scored twice.
    assert main([*options, *more, *flags.split()]) == 2
    assert "--resume" in capsys.readouterr().err
    before = (tmp_path / "factors.journal.jsonl").read_bytes()
    assert main([*options, *more, *flags.split(), "--resume"]) == 0
    assert (tmp_path / "factors.journal.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "factors.json").read_text()) == config


def test_a_needle_search_names_its_needles(options, data, tmp_path, capsys):
    flags = ["--objective", "needle", "--tokenizer", data["tokenizer"], "--target-length", "640",
             "--max-evaluations", "4", "--attention-factor-policy", "su", "--num-samples", "2",
             "--needle-depths", "0,0.5,1"]  # fmt: skip
    assert main([*options, *flags, "--no-figures"]) == 0
    origin = json.loads((tmp_path / "factors.json").read_text())["factor_sets"][-1]["origin"]
    assert origin["needles"]["depths"] == [0.0, 0.5, 1.0]
    assert origin["retrieval"]["asked_in"] == "the search's own documents"
    assert "numbers hidden in the search's own documents\n" in capsys.readouterr().out
    assert origin["parameters"]["num_samples"] == 3  # two documents take turns
    assert all(10**6 <= number < 10**7 for number in origin["needles"]["numbers"])
    assert not (tmp_path / "factors_figures").exists()


def test_a_second_search_multiplies_and_a_recovery_search_replaces(options, data, tmp_path):
    small = ["--max-evaluations", "6", "--start-tokens", "0", "--no-figures"]
    first = str(tmp_path / "factors.json")
    assert main([*options, *small, "--target-length", "128"]) == 0

    def run(length, output):
        more = ["--base-config", first, "--target-length", str(length), "--output", output]
        assert main([*options, *small, *more]) == 0
        return factors_and_attention(output)

    def factors_and_attention(path):
        config = json.loads(Path(path).read_text())
        return config["factor_sets"], config["attention_factor"]

    def su(ratio):
        return pytest.approx(math.sqrt(1 + math.log(ratio) / math.log(64)))

    base, pinned = factors_and_attention(first)
    second, longer = run(256, str(tmp_path / "second.json"))
    # LongRoPE's own at the target, one value for all windows, so that the result can be exported.
    assert (pinned, longer) == (su(2), su(4))
    assert [item["max_length"] for item in second] == [64, 128, 256]
    assert second[:2] == base and second[2]["origin"]["stage"] == "second"
    factors = zip(base[1]["rescale_factors"], second[2]["rescale_factors"], strict=True)
    assert all(1 <= longer / shorter <= 2.5 for shorter, longer in factors)
    recovered, kept = run(64, str(tmp_path / "recovery.json"))
    assert kept == pinned
    assert recovered[0]["origin"]["stage"] == "recovery" and recovered[1:] == base[1:]


def test_the_factors_that_a_model_carries_are_the_base(options, data, tmp_path, capsys):
    carried = maker.longrope_config()
    own = [item for item in options if item not in ("--base-config", "none")]
    small = ["--max-evaluations", "4", "--no-figures", "--target-length", "512"]
    assert main([*own, *small]) == 0
    assert "the base is the model's own factors, for 64, 256 tokens" in capsys.readouterr().out
    config = LongRopeConfig.load(tmp_path / "factors.json")
    assert config.factor_sets[:2] == carried.factor_sets
    assert config.attention_factor_for(512) == carried.attention_factor == 1.15
    found = config.factor_sets[2]
    assert found.origin["stage"] == "second" and found.max_length == 512
    assert all(
        longer >= shorter
        for longer, shorter in zip(
            found.rescale_factors, carried.factor_sets[1].rescale_factors, strict=True
        )
    )
    # Within its window it is a recovery; another pre-trained window is a contradiction.
    assert main([*own, "--target-length", "64", "--dry-run"]) == 0
    assert main([*own, "--original-length", "128", "--dry-run"]) == 2
    assert "--original-length 128 contradicts" in capsys.readouterr().err


def test_data_without_bos_can_be_searched(options, no_weights, tmp_path, capsys):
    data = make_search_data(tmp_path, bos=False)
    options[options.index("--data") + 1] = data["search"]
    needle = ["--objective", "needle", "--tokenizer", data["tokenizer"]]
    for flags in ([], ["--bos", "1"], [*needle, "--target-length", "1k"]):
        assert main([*options, *flags, "--dry-run"]) == 0, capsys.readouterr().err
    assert main([*options, "--bos", "5000", "--dry-run"]) == 2
    assert "--bos 5000 is no token id" in capsys.readouterr().err


def test_needles_that_could_not_be_asked_are_a_reason_before_the_search_and_no_failure_after_it(
    options, data, untied_gqa
):
    args = parsed([*options, "--target-length", "640"])
    assert needles_or_reason(args).tokens.shape == (3, 640)
    reason = needles_or_reason(replace(args, target_length=32))
    assert "length 32 is too short" in reason
    assert needles_or_reason(replace(args, retrieval_trials=0)) == "--retrieval-trials is 0"


@pytest.mark.parametrize("objective", ["needle", "joint"])
@pytest.mark.parametrize(
    "flags", ["", "--num-samples 2", "--needle-depths 0", "--needle-depths 1,0.5"]
)
def test_no_closing_question_is_one_that_candidates_were_scored_by(options, data, objective, flags):
    more = f"--objective {objective} --target-length 640 --tokenizer {data['tokenizer']} {flags}"
    args = parsed([*options, *more.split()])
    scored, asked = read_samples(args, args.data, objective).needles, needles_or_reason(args)
    assert len({*asked.depths, *scored["depths"]}) == 3 + len({*scored["depths"]})
    # Another number of draws from one seed has nearly the same ones.
    apart = [abs(one - other) for one in asked.numbers for other in scored["numbers"]]
    assert min(apart) > 1000
