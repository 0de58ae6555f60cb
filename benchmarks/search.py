"""Our searches, against a re-implementation of the operators of the released LongRoPE search.

    python benchmarks/search.py                             # trains the model first, then hours
    python benchmarks/search.py --model build/quickstart    # with the quickstart's model
    python benchmarks/search.py --model build/quickstart --quick    # minutes, writes nothing

Claim: our searches reach the held-out perplexity that the released operators end with, with at most
a quarter of their sample-forwards (one window through the model, which is what a search costs).
`ratio_from_yarn` asks the same against the released operators started from YaRN, which is harder.

The quickstart's base model (256 tokens) is extended 8 times, without training. An arm is a search;
all arms score the same windows of search text, with the same attention factor. Arms with `full` in
their name get the budget of the released search, so that equal costs are compared too. Every seed
of every arm is a run. Scores are kept in `--output` as they come: an interrupted run goes on, and a
long benchmark may be split over processes (`--arms released --seeds 0`); the last call, without
those two flags, puts everything together. Other sizes need another `--output`, or `--overwrite`.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import torch
from released_operators import ReleasedSearch, released_seed, released_space
from search_curves import ArmRun, draw_curves, print_summary, summarise

from megatron_longrope.checkpoint.fingerprint import content_sha256
from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import identity_config
from megatron_longrope.data.documents import read_manifest, read_window_documents
from megatron_longrope.engine import load_engine
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.generations import Trial
from megatron_longrope.factor_search.journal import (
    Evaluation,
    Journal,
    fresh_samples,
    is_complete,
)
from megatron_longrope.factor_search.objective import PerplexityObjective, window_samples
from megatron_longrope.factor_search.outcome import scores_on
from megatron_longrope.factor_search.problem import SearchProblem, make_problem
from megatron_longrope.factor_search.runner import SearchRun, run_search
from megatron_longrope.factor_search.scoring import score_trial
from megatron_longrope.factor_search.space import Candidate, GivenFactors, SearchSpace
from megatron_longrope.files import write_text_atomic

ROOT = Path(__file__).parents[1]
EXTENSION = 8
POLICY = "su"
GRID_RATIO = 1.25  # between the numbers of forwards at which held-out text is looked at

BASELINES = ("released", "released_yarn")
"""The first is what was released and sets the target of the claim; the second starts from the true
YaRN, as ours do, without the release's mistake in its ramp: it tells the operators' share."""

ARMS = (*BASELINES, "evolution", "cma", "cma_full")

WHOLE = (*BASELINES, "cma_full")
"""Arms that get the whole budget."""

SHARE = 0.25
"""Part of the budget that the other arms get: what the claim is about, and CMA-ES' default."""


@dataclass(frozen=True)
class Sizes:
    """How much work a run is."""

    parameters: EvolutionParameters
    """Of the released operators and of our evolution."""

    samples: int
    """Windows of search text."""

    held_out: int
    """Windows of held-out text."""

    @property
    def budget(self) -> int:
        """Sample-forwards of the released search from begin to end."""
        return self.parameters.total_evaluations * self.samples


# Three samples, as in the paper from 512k on; its five for shorter targets would take hours more.
FULL = Sizes(EvolutionParameters(), samples=3, held_out=8)
QUICK = Sizes(
    EvolutionParameters(
        population_size=16, num_mutations=4, num_crossovers=4, max_iterations=5, num_parents=8
    ),
    samples=2,
    held_out=2,
)


@dataclass(frozen=True)
class Bench:
    """The model, the problem and the texts, `search` and `held_out`, that all arms share."""

    problem: SearchProblem
    objectives: dict[str, PerplexityObjective]
    settings: dict[str, dict[str, Any]]
    """What the scores on a text depend on."""

    sizes: Sizes

    @classmethod
    def load(cls, model: Path, sizes: Sizes) -> Bench:
        """From a directory as the quickstart leaves it."""
        checkpoint = model / "checkpoints/base"
        engine = load_engine(checkpoint)
        shape = engine.shape
        window = engine.config.original_max_position_embeddings
        base = identity_config(shape.rotary_base, shape.rotary_dim, window)
        problem = make_problem(base, EXTENSION * window, start_tokens=(0,))
        bench = cls(problem.with_attention(None, POLICY), {}, {}, sizes)
        length = problem.target_length
        for text, name, count in (
            ("search", "search", sizes.samples),
            ("held_out", "heldout", sizes.held_out),
        ):
            documents, bos_id = read_window_documents(model / "data" / name, length, count)
            # One window at a time: on a CPU a batch is no faster.
            bench.objectives[text] = PerplexityObjective(
                engine, window_samples(documents, bos_id, length), tokens_per_forward=length
            )
            bench.settings[text] = {
                "checkpoint": content_sha256(MegatronCheckpoint.open(checkpoint).directory),
                "target_length": length,
                "attention_factor_policy": POLICY,
                "text": read_manifest(model / "data" / name)["token_sha256"],
                "windows": count,
            }
        return bench

    def search(
        self, arm: str, seed: int, evaluations: int
    ) -> ReleasedSearch | EvolutionSearch | CmaSearch:
        """An arm's search, of at most so many evaluations."""
        space, sizes = self.problem.space, self.sizes.parameters
        seeds = list(self.problem.seeds.values())
        if arm == "evolution":
            return EvolutionSearch(space, sizes, seeds, seed, max_evaluations=evaluations)
        if arm in ("cma", "cma_full"):
            # The search plans with its budget.
            parameters = CmaParameters(evaluations, num_samples=self.sizes.samples)
            return CmaSearch(space, parameters, seeds, seed)
        released, start = self.released_start()
        if arm == "released_yarn":
            start = self.problem.seeds["yarn"]  # both grids have the same points
        return ReleasedSearch(released, sizes, [start], seed, evaluations)

    def released_start(self) -> tuple[SearchSpace, Candidate]:
        """Space and starting point of the release."""
        base, ours = self.problem.base, self.problem.space
        space = released_space(ours.num_factors, ours.scale)
        seed = released_seed(space, base.rotary_base, base.original_max_position_embeddings)
        return space, seed

    def orientation(self) -> dict[str, dict[str, float]]:
        """Perplexity of the starting points on both texts."""
        points = {**self.problem.seeds, "released_seed": self.released_start()[1]}
        scores = {
            text: scores_on(objective, self.problem, points)
            for text, objective in self.objectives.items()
        }
        return {name: {text: round(scores[text][name], 4) for text in scores} for name in points}


def run_arm(
    bench: Bench, name: str, seed: int, budget: int, directory: Path, *, overwrite: bool = False
) -> ArmRun:
    """One search with `budget` sample-forwards, then its curves from what it has recorded."""
    samples = bench.sizes.samples
    search = bench.search(name, seed, budget // samples)
    journal = directory / f"{name}-{seed}.jsonl"
    settings = {**bench.settings["search"], "parameters": asdict(search.parameters)}
    outcome = run_search(
        search, bench.problem, bench.objectives["search"],
        # Whoever is stopped by a race costs less, and the claim is not about races.
        SearchRun(journal, settings, racing="off", resume=True, overwrite=overwrite),
        label=f"{name} seed {seed}",
    )  # fmt: skip
    run = ArmRun(name, seed, evaluations=outcome.num_evaluations)
    if isinstance(search, ReleasedSearch):
        run.notes = {"capped": search.num_capped}
    due, counted = grid(samples, budget), {}
    leaders: list[tuple[int, Evaluation]] = []  # the best wherever held-out text is looked at
    for record in outcome.records:
        run.forwards += fresh_samples(record, counted)
        if is_complete(record) and (not run.search or record.score < run.search[-1][1]):
            run.search.append((run.forwards, record.score))
            best = record
        if run.search and (run.forwards >= due[0] or record is outcome.records[-1]):
            due = [number for number in due if number > run.forwards] or [budget]
            leaders.append((run.forwards, best))
    path = journal.with_suffix(".heldout.jsonl")
    with Journal(path, bench.settings["held_out"], resume=True, overwrite=overwrite) as looked_at:
        known = {record.rescale_factors: record.score for record in looked_at.records}
        for forwards, best in leaders:
            factors = best.rescale_factors
            if factors not in known:
                trial = Trial(len(known), GivenFactors(factors))
                record = score_trial(trial, bench.problem, bench.objectives["held_out"])
                looked_at.append(record)
                known[factors] = record.score
            run.held_out.append((forwards, known[factors]))
    return run


def grid(samples: int, budget: int) -> list[int]:
    """Sample-forwards at which held-out text is looked at: whole candidates, evenly spaced logs."""
    last = budget // samples
    count = max(math.ceil(math.log(max(last, 1)) / math.log(GRID_RATIO)), 0)
    candidates = {min(math.ceil(GRID_RATIO**power), last) for power in range(count + 1)}
    return [samples * number for number in sorted(candidates)]


def quickstart_model(output: Path) -> Path:
    """Run the quickstart's stages up to its base model.

    Raises:
        SystemExit: One of them failed.
    """
    command = [ROOT / "examples/run.sh", "quickstart-full", output, "--until", "pretrain"]
    environment = {**os.environ, "PYTHON": sys.executable}
    if subprocess.run(list(map(str, command)), env=environment).returncode:
        raise SystemExit("search benchmark: the quickstart's base model is not there; see above")
    return output


def comma_list(text: str) -> list[str]:
    """argparse type."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_options() -> argparse.Namespace:
    """The command line; wrong values end the program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few candidates; needs --model")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="output directory of the quickstart"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/benchmarks/search"), help="model and scores"
    )
    parser.add_argument("--arms", type=comma_list, default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--seeds", type=comma_list, help="default: 0,1,2; with --quick 0")
    parser.add_argument("--samples", type=int, help="windows of search text")
    parser.add_argument("--held-out-samples", type=int, help="windows of held-out text")
    parser.add_argument(
        "--budget", type=int, help="sample-forwards of every arm (default: the released search's)"
    )
    parser.add_argument(
        "--budget-fraction",
        type=float,
        help="of the budget, for our arms without `full` in their name (default: 0.25)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="discard the scores of these arms and seeds"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := sorted(set(options.arms) - set(ARMS)):
        parser.error(f"--arms: {unknown[0]!r} is unknown; choose among {', '.join(ARMS)}")
    if options.quick and options.model is None:
        parser.error(
            "--quick needs --model DIR, the output directory of the quickstart: a search on a "
            "model that has not learned anything says nothing, and training one takes longer "
            "than a quick run may"
        )
    if options.budget_fraction is not None and not 0 < options.budget_fraction <= 1:
        parser.error("--budget-fraction must be above 0 and at most 1")
    return options


def main() -> None:
    """Run what is missing, print a table and the result."""
    options = parse_options()
    sizes = QUICK if options.quick else FULL
    seeds = [int(seed) for seed in options.seeds or (["0"] if options.quick else "012")]
    sizes = replace(
        sizes,
        samples=options.samples or sizes.samples,
        held_out=options.held_out_samples or sizes.held_out,
    )
    full_run = (
        not (options.quick or options.samples or options.held_out_samples or options.budget)
        and set(ARMS) <= set(options.arms)
        and len(seeds) >= 3
    )
    torch.set_num_threads(options.threads)
    measure.print_environment()
    bench = Bench.load(options.model or quickstart_model(options.output), sizes)
    directory = options.output / ("quick" if options.quick else "runs")
    budget = options.budget or sizes.budget
    finished = []
    for arm in options.arms:
        for seed in seeds:
            share = 1.0 if arm in WHOLE else options.budget_fraction or SHARE
            run = run_arm(
                bench, arm, seed, int(share * budget), directory, overwrite=options.overwrite
            )
            finished.append(run)
            print(
                f"{arm} seed {seed}: {run.forwards} forwards, perplexity "
                f"{run.search[-1][1]:.4f}, held out {run.held_out[-1][1]:.4f}",
                flush=True,
            )
    summary, from_yarn = (summarise(finished, name, BASELINES) for name in BASELINES)
    orientation = bench.orientation()
    print_summary(summary, orientation)
    print("\nagainst the released operators from YaRN:")
    print_summary(from_yarn, {})
    if full_run:
        drawing = draw_curves(finished, orientation["yarn"]["held_out"])
        measure.RESULTS.mkdir(exist_ok=True)
        (measure.RESULTS / "search.png").write_bytes(drawing.png)
        write_text_atomic(measure.RESULTS / "search.csv", drawing.csv)
    measure.finish(
        "search",
        summary["ratio"],
        full_run=full_run,
        ratio_of="sample-forwards until the best of our searches reaches, and from then on keeps, "
        "the held-out perplexity that the released operators end with (medians over seeds) / "
        "sample-forwards of the released operators; null: not reached. ratio_from_yarn: the same "
        "against the released operators started from YaRN instead of their own seed",
        ratio_from_yarn=from_yarn["ratio"],
        from_yarn={key: value for key, value in from_yarn.items() if key != "ratio"},
        budget=budget,
        target_length=bench.problem.target_length,
        extension_ratio=EXTENSION,
        attention_factor_policy=POLICY,
        samples=sizes.samples,
        held_out_samples=sizes.held_out,
        seeds=seeds,
        evolution_parameters=asdict(sizes.parameters),
        orientation=orientation,
        **{key: value for key, value in summary.items() if key != "ratio"},
    )


if __name__ == "__main__":
    try:
        main()
    except LongRopeError as error:  # such as scores of an earlier version
        raise SystemExit(f"search benchmark: {error}") from None
