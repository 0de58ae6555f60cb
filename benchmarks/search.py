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
those two flags, puts everything together.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Megatron decorates small functions with torch.compile, which costs minutes on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import measure
import torch
from released_operators import ReleasedSearch, released_seed, released_space
from search_curves import ArmRun, draw_curves, print_summary, summarise
from search_texts import Scores, Windows, perplexity

from megatron_longrope.checkpoint.reader import MegatronCheckpoint
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.engine import load_engine
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.generations import GenerationalSearch, Trial
from megatron_longrope.factor_search.problem import SearchProblem, make_problem
from megatron_longrope.files import write_text_atomic
from megatron_longrope.progress import Progress

ROOT = Path(__file__).parents[1]
EXTENSION = 8
POLICY = "su"
GRID_RATIO = 1.25  # between the numbers of forwards at which held-out text is looked at


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
    """The model, the problem and the text that all arms share."""

    problem: SearchProblem
    search_text: Windows
    held_out: Windows
    settings: dict[str, Any]
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
        problem = problem.with_attention(None, POLICY)
        length = problem.target_length
        settings = {
            "checkpoint": content_sha256(MegatronCheckpoint.open(checkpoint).directory),
            "target_length": length,
            "attention_factor_policy": POLICY,
        }
        return cls(
            problem,
            Windows(engine, model / "data/search", length, sizes.samples),
            Windows(engine, model / "data/heldout", length, sizes.held_out),
            settings,
            sizes,
        )

    def orientation(self) -> dict[str, dict[str, float]]:
        """Perplexity of the starting points on both texts."""
        return {
            name: {
                text: round(perplexity(windows.nlls(config, 0, windows.count)), 4)
                for text, windows in (("search", self.search_text), ("held_out", self.held_out))
            }
            for name, config in self._starting_points().items()
        }

    def _starting_points(self) -> dict[str, LongRopeConfig]:
        ours = {name: self.problem.config(seed) for name, seed in self.problem.seeds.items()}
        released = released_problem(self.problem)
        return {**ours, "released_seed": released.config(*released.seeds.values())}


Maker = Callable[[Bench, int, int], GenerationalSearch]
"""(bench, seed, number of evaluations) -> search."""


def released_problem(problem: SearchProblem) -> SearchProblem:
    """The same problem with the space and the starting point of the release."""
    base = problem.base
    space = released_space(problem.space.num_factors, problem.space.scale)
    seed = released_seed(space, base.rotary_base, base.original_max_position_embeddings)
    return replace(problem, space=space, seeds={"released": seed}, exact={})


def _released(bench: Bench, seed: int, evaluations: int) -> ReleasedSearch:
    problem = released_problem(bench.problem)
    seeds = list(problem.seeds.values())
    return ReleasedSearch(problem.space, bench.sizes.parameters, seeds, seed, evaluations)


def _released_yarn(bench: Bench, seed: int, evaluations: int) -> ReleasedSearch:
    """The released operators from the true YaRN, without the release's mistake in its ramp."""
    problem = released_problem(bench.problem)
    yarn, _ = bench.problem.space.decode(bench.problem.seeds["yarn"])
    seeds = [problem.space.encode(yarn)]
    return ReleasedSearch(problem.space, bench.sizes.parameters, seeds, seed, evaluations)


def _evolution(bench: Bench, seed: int, evaluations: int) -> EvolutionSearch:
    problem = bench.problem
    seeds = list(problem.seeds.values())
    return EvolutionSearch(
        problem.space, bench.sizes.parameters, seeds, seed, max_evaluations=evaluations
    )


def _cma(bench: Bench, seed: int, evaluations: int) -> GenerationalSearch:
    from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch

    problem = bench.problem
    seeds = list(problem.seeds.values())
    # The search plans with its budget.
    parameters = CmaParameters(max_evaluations=evaluations, num_samples=bench.sizes.samples)
    return CmaSearch(problem.space, parameters, seeds, seed)


ARMS: dict[str, Maker] = {
    "released": _released,
    "released_yarn": _released_yarn,
    "evolution": _evolution,
    "cma": _cma,
    "cma_full": _cma,
}
"""A search may ask for some of the samples only (`Trial.samples`): its arm then pays for those."""

BASELINES = ("released", "released_yarn")
"""The first is what was released and sets the target of the claim; the second, which starts where
ours do, tells what is the operators' share."""

WHOLE = (*BASELINES, "cma_full")
"""Arms that get the whole budget."""

STANDARD = (*BASELINES, "evolution", "cma", "cma_full")
"""The arms of a full run."""

SHARE = 0.25
"""Part of the budget that the other arms get: what the claim is about, and CMA-ES' default."""


def run_arm(bench: Bench, name: str, seed: int, budget: int, directory: Path) -> ArmRun:
    """One search to its end, or until `budget` sample-forwards are spent."""
    samples = bench.sizes.samples
    search = ARMS[name](bench, seed, budget // samples)
    problem = replace(bench.problem, space=search.space)
    paid: dict[Any, int] = {}  # windows of each candidate that this search has paid for
    run = ArmRun(name, seed)
    checkpoints = grid(samples, budget)
    with ExitStack() as stack:
        path = directory / f"{name}-{seed}.jsonl"
        scores = Scores(path, bench.settings, bench.search_text)
        stack.callback(scores.close)
        held_out = Scores(path.with_suffix(".heldout.jsonl"), bench.settings, bench.held_out)
        stack.callback(held_out.close)
        left = max(budget - scores.num_resumed, 1)
        bar = stack.enter_context(Progress(left, f"{name} seed {seed}", "forwards"))

        def look_at_held_out() -> None:
            nlls, _ = held_out.nlls(problem.config(search.best[0]), bench.sizes.held_out)
            run.held_out.append((run.forwards, perplexity(nlls)))

        def score(trial: Trial) -> None:
            count = trial.samples or samples
            nlls, fresh = scores.nlls(problem.config(trial.candidate), count)
            value = perplexity(nlls)
            # What the search costs, whatever of it came from the file.
            run.forwards += max(0, count - paid.get(trial.candidate, 0))
            paid[trial.candidate] = max(count, paid.get(trial.candidate, 0))
            run.evaluations += 1
            search.tell(trial.candidate, value)
            if count == samples and (not run.search or value < run.search[-1][1]):
                run.search.append((run.forwards, value))
            if fresh:
                bar.update(f"best {run.search[-1][1]:.4f}" if run.search else "", fresh)
            if run.search and run.forwards >= checkpoints[0]:
                while len(checkpoints) > 1 and run.forwards >= checkpoints[0]:
                    checkpoints.pop(0)
                look_at_held_out()

        while run.forwards < budget and (trials := search.trials()):
            for trial in trials:
                if run.forwards < budget:
                    score(trial)
        if run.held_out[-1][0] < run.forwards:
            look_at_held_out()
    run.notes = {"capped": search.num_capped} if isinstance(search, ReleasedSearch) else {}
    return run


def grid(samples: int, budget: int) -> list[int]:
    """Sample-forwards at which held-out text is looked at: whole candidates, evenly spaced logs."""
    last = budget // samples
    count = max(math.ceil(math.log(max(last, 1)) / math.log(GRID_RATIO)), 0)
    candidates = {min(math.ceil(GRID_RATIO**power), last) for power in range(count + 1)}
    return [samples * number for number in sorted(candidates)]


def content_sha256(directory: Path) -> str:
    """Of all files of a directory."""
    digest = hashlib.sha256()
    for path in sorted(item for item in directory.rglob("*") if item.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def quickstart_model(output: Path) -> Path:
    """Run the quickstart's stages up to its base model.

    Raises:
        RuntimeError: One of them failed.
    """
    command = [ROOT / "examples/run.sh", "quickstart-full", output, "--until", "pretrain"]
    environment = {**os.environ, "PYTHON": sys.executable}
    if subprocess.run(list(map(str, command)), env=environment).returncode:
        raise RuntimeError("the quickstart's base model is not there; see above")
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
    parser.add_argument("--arms", type=comma_list, default=list(STANDARD), help=", ".join(ARMS))
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
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := sorted(set(options.arms) - ARMS.keys()):
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


def main() -> int:
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
        and set(STANDARD) <= set(options.arms)
        and len(seeds) >= 3
    )
    torch.set_num_threads(options.threads)
    measure.print_environment()
    try:
        bench = Bench.load(options.model or quickstart_model(options.output), sizes)
    except RuntimeError as error:
        print(f"search benchmark: {error}", file=sys.stderr)
        return 1
    budget = options.budget or sizes.budget
    finished = []
    for arm in options.arms:
        for seed in seeds:
            share = 1.0 if arm in WHOLE else options.budget_fraction or SHARE
            run = run_arm(bench, arm, seed, int(share * budget), options.output / "runs")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
