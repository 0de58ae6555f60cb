"""A whole search as the command line asks for it: from its settings to the files it leaves."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_longrope.checkpoint.fingerprint import content_sha256
from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.checkpoint.opening import check_vocabulary, open_checkpoint
from megatron_longrope.config import LongRopeConfig
from megatron_longrope.context_parallel import check_divisible
from megatron_longrope.data.documents import read_manifest, tokenizer_of
from megatron_longrope.data.tokenizer import check_same_tokens
from megatron_longrope.engine import Engine
from megatron_longrope.engine.loading import default_dtype
from megatron_longrope.errors import LongRopeError
from megatron_longrope.factor_search import outcome as outcome_files
from megatron_longrope.factor_search.base import base_of, start_token_choices
from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.generations import WORTHWHILE
from megatron_longrope.factor_search.journal import read_records
from megatron_longrope.factor_search.known_scores import Team
from megatron_longrope.factor_search.needle import NeedleSamples
from megatron_longrope.factor_search.objective import PerplexityObjective
from megatron_longrope.factor_search.options import SearchOptions
from megatron_longrope.factor_search.problem import SearchProblem, make_problem
from megatron_longrope.factor_search.replicas import Replica
from megatron_longrope.factor_search.retrieval import check_retrieval
from megatron_longrope.factor_search.runner import SearchOutcome, SearchRun, run_search
from megatron_longrope.factor_search.samples import Samples, needles_or_reason, read_samples
from megatron_longrope.factor_search.trial_queue import shared_store
from megatron_longrope.files import check_folder
from megatron_longrope.ranks import rank


@dataclass(frozen=True)
class SearchPlan:
    """Settings that were checked before any weight is loaded."""

    options: SearchOptions
    """What it was told."""
    parameters: CmaParameters | EvolutionParameters
    """Sizes of the algorithm."""
    checkpoint: Checkpoint
    """Whose model is searched for; only its metadata has been read."""
    problem: SearchProblem
    """What is searched, under the base's attention factor."""
    samples: Samples
    """What candidates are scored on."""
    held_out: Samples | None
    """Windows of the held-out documents, if there are any; perplexity is measured on them."""
    needles: NeedleSamples | str
    """What references and winner are asked for at the end, or why they are not."""

    @classmethod
    def from_options(cls, options: SearchOptions) -> SearchPlan:
        """Check everything that can be checked without the model.

        Raises:
            LongRopeError: Something does not fit; one sentence says what.
        """
        args, parameters = options, options.parameters()
        if not 0 < args.needle_weight < math.inf:
            raise LongRopeError(f"--needle-weight {args.needle_weight} must be above 0")
        args.check_meaning()
        if args.retrieval_trials < 0:
            raise LongRopeError(f"--retrieval-trials {args.retrieval_trials} must be at least 0")
        if Path(args.output).is_dir():
            raise LongRopeError(f"--output {args.output} is a directory; name a JSON file")
        if Path(args.output).suffix != ".json":  # `v1.2` and `v1.25` would share v1.journal.jsonl
            raise LongRopeError(
                f"--output {args.output} must end in .json: journal and figures have its name "
                f"without that; give {args.output}.json"
            )
        for path in (Path(args.output), args.journal):
            check_folder(path.parent)
        written = Path(args.output).exists() and not args.dry_run and not args.overwrite
        if written and not args.journal.exists():  # then it is no result of this search
            raise LongRopeError(
                f"{args.output} exists without its journal {args.journal}; move it away, or give "
                "--overwrite in the place of --resume"
            )
        checkpoint = open_checkpoint(args.load, args.hf, args.iteration, args.sliding_window)
        problem = make_problem(
            base_of(args, checkpoint),
            args.target_length,
            upper=args.upper,
            start_tokens=start_token_choices(args.start_tokens),
            space=args.space,
            critical_dimension=args.critical_dimension,
            warm_start=LongRopeConfig.load(args.warm_start) if args.warm_start else None,
            for_retrieval=args.objective != "ppl",
        )
        check_divisible(args.target_length, args.context_parallel_size)
        _check_tokens(args, checkpoint)
        samples = read_samples(args, args.data, args.objective)
        if isinstance(parameters, CmaParameters):
            # More needle depths than documents are more samples.
            parameters = replace(parameters, num_samples=len(samples))
        held_out = None
        if args.held_out:
            held_out = read_samples(args, args.held_out, "ppl")
        needles = needles_or_reason(args)
        plan = cls(options, parameters, checkpoint, problem, samples, held_out, needles)
        plan._algorithm()  # seeds that do not fit its sizes
        if isinstance(needles, str) and rank() == 0:
            print(f"retrieval will not be measured: {needles}", flush=True)
        return plan

    def _algorithm(self) -> CmaSearch | EvolutionSearch:
        args, space, seeds = self.options, self.problem.space, list(self.problem.seeds.values())
        shared: dict[str, Any] = {"lookahead": args.lookahead, "patience": args.patience}
        if isinstance(self.parameters, CmaParameters):
            return CmaSearch(space, self.parameters, seeds, args.seed, **shared)
        shared["max_evaluations"] = args.max_evaluations
        return EvolutionSearch(space, self.parameters, seeds, args.seed, **shared)

    def estimate(self) -> Sequence[str]:
        """Return FLOPs, memory and hours in words."""
        from megatron_longrope.plan.hardware import parse_gpu
        from megatron_longrope.plan.search_cost import estimate_command

        args = self.options
        model_ranks = args.tensor_model_parallel_size * args.context_parallel_size
        count = len(self.samples)
        forwards = self._algorithm().total_samples(count)
        gpus = args.gpus or model_ranks
        if gpus % model_ranks:
            raise LongRopeError(
                f"--gpus {gpus} is not a multiple of tensor parallel x context parallel = "
                f"{model_ranks}"
            )
        lines = estimate_command(
            args,
            self.checkpoint.shape,
            samples=count,
            evaluations=-(-forwards // count),
            gpus=gpus,
            gpu=parse_gpu(args.gpu),
            mfu=args.mfu,
        ).lines()
        rows = len(self.problem.references) + 1
        closing = 0 if self.held_out is None else rows * len(self.held_out)
        if not isinstance(self.needles, str):
            closing += rows * len(self.needles.tokens)
        lines.append(f"and {closing} samples at the end, for held-out text and needle answers")
        if args.patience:
            lines.append(
                f"at most: it ends when {args.patience} evaluations in a row have lowered the best "
                f"score by no more than {WORTHWHILE:.1%}"
            )
        return lines

    def run(self, engine: Engine) -> bool:
        """Search, and write the winner with what is known about it.

        Args:
            engine (Engine): This rank's part of the model, loaded with `replicas=True`.

        Returns:
            bool: Whether this is the first rank, which has written it.
        """
        args = self.options
        replica = Replica(engine, args.tensor_model_parallel_size * args.context_parallel_size)
        store = shared_store() if replica.count > 1 else None
        if not replica.is_leader:
            replica.serve()
            return False
        try:
            return self._lead(replica, Team(replica.index, replica.count, store))
        finally:
            replica.close()

    def _lead(self, model: Replica, team: Team) -> bool:
        args = self.options
        found = self._find(model, team)
        if found is None:
            return False
        problem, outcome, settings, objective = found
        verdict = None
        asked_in = "the held-out documents" if args.held_out else "the search's own documents"
        if not isinstance(self.needles, str):
            verdict = check_retrieval(
                model, self.needles, problem, outcome, accept_worse=args.accept_worse_retrieval
            )
            outcome = verdict.outcome
        origin = {
            **self._origin(problem, outcome, settings),
            "retrieval": ({"asked_in": asked_in, **verdict.to_dict()} if verdict else self.needles),
        }
        held_out = {}
        if self.held_out is not None:
            # First without: what fails from here on must not take the winner along.
            outcome_files.write(args.output, problem, outcome, origin)
            measured = {**problem.references, "longrope": outcome.candidate}
            held_out = outcome_files.scores_on(
                self._objective(model, self.held_out), problem, measured
            )
            origin["held_out_perplexity"] = held_out
            origin["held_out_sha256"] = read_manifest(args.held_out)["token_sha256"]
        outcome_files.write(args.output, problem, outcome, origin)
        name = "perplexity" if args.objective == "ppl" else "score"
        outcome_files.print_summary(problem, outcome, held_out, verdict, asked_in, name)
        notes = []
        if verdict is None:
            notes.append(f"retrieval was not measured: {self.needles}")
        elif verdict.reason:
            notes.append(f"{verdict.reason} (--accept-worse-retrieval keeps the best score)")
        notes += outcome_files.export_notes(problem, outcome, objective)
        for note in notes:
            print(note)
        print(f"wrote {args.output}")
        return True

    def _find(
        self, model: Replica, team: Team
    ) -> tuple[SearchProblem, SearchOutcome, dict[str, Any], PerplexityObjective] | None:
        """Run the search to its end.

        Returns:
            tuple: The problem under the attention factor of the search, the winner, the settings
                that it was found with and what it was scored on; None on every rank but the first.
        """
        args = self.options
        objective, problem = self._objective(model, self.samples), self._with_attention()
        settings = self._settings()
        # An evolution of more iterations goes on from one of fewer.
        sizes = {k: v for k, v in settings["parameters"].items() if k != "max_iterations"}
        attention = [problem.base.attention_factor, problem.base.attention_factor_policy]
        run = SearchRun(
            args.journal, {**settings, "parameters": sizes, "attention": attention}, args.racing,
            args.resume, args.overwrite, team,
        )  # fmt: skip
        references = list(problem.references.values())
        outcome = run_search(self._algorithm(), problem, objective, run, references=references)
        return (problem, outcome, settings, objective) if rank() == 0 else None

    def _origin(
        self, problem: SearchProblem, outcome: SearchOutcome, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Where the factors come from, but for what is measured at the end."""
        return {
            "method": f"longrope-{self.options.algorithm}",
            "stage": problem.stage,
            "scale": problem.space.scale,
            "search_perplexity": outcome.score,
            "seed_perplexity": outcome.seed_scores,
            "evaluations": outcome.num_evaluations,
            "failed_evaluations": outcome.num_failed,
            "sample_forwards": outcome.sample_forwards,
            "sample_forwards_saved": outcome.sample_forwards_saved,
            "checkpoint": str(self.checkpoint.directory),
            **{key: value for key, value in settings.items() if key != "base"},
            "racing": self.options.racing if self.options.algorithm == "evolution" else "off",
            "date": datetime.date.today().isoformat(),
            "versions": outcome_files.versions(),
        }

    def _objective(self, model: Replica, samples: Samples) -> PerplexityObjective:
        return PerplexityObjective(
            model,
            samples.tokens,
            weights=samples.weights,
            tokens_per_forward=self.options.tokens_per_forward,
        )

    def _settings(self) -> dict[str, Any]:
        """What a resumed search must agree on, and what a result's provenance names."""
        args, space = self.options, self.problem.space
        return {
            "algorithm": args.algorithm,
            "stage": self.problem.stage,
            "target_length": args.target_length,
            "base": self.problem.base.to_dict(),
            "parameters": asdict(self.parameters),
            "lookahead": args.lookahead,
            "space": args.space,
            "start_tokens": list(space.start_tokens),
            "critical_dimensions": list(getattr(space, "critical_dimensions", ())),
            "floor_dimension": space.floor_dimension,
            "references": {
                name: [*given.rescale_factors, given.num_start_tokens]
                for name, given in self.problem.references.items()
            },
            "upper": space.max_step,
            "seed": args.seed,
            "objective": args.objective,
            "num_samples": args.num_samples,
            "windows_per_document": args.windows_per_document,
            "needles": self.samples.needles,
            "needle_weight": args.needle_weight if args.objective == "joint" else None,
            "patience": args.patience,
            "tokens_per_forward": args.tokens_per_forward,
            "data_sha256": read_manifest(args.data)["token_sha256"],
            "bos": self.samples.bos,
            "checkpoint_sha256": content_sha256(self.checkpoint.directory),
            "sliding_window": self.checkpoint.shape.sliding_window,
            "dtype": args.dtype or str(default_dtype(self.checkpoint.shape)).removeprefix("torch."),
        }

    def _with_attention(self) -> SearchProblem:
        """The problem under the attention factor that the options ask for."""
        args, problem, base = self.options, self.problem, self.problem.base
        policy = base.attention_factor_policy
        if args.attention_factor_policy is not None:
            return problem.with_attention(None, args.attention_factor_policy)
        # One value for every window is what Hugging Face's longrope and its readers hold.
        if args.attention_factor == "longest":
            value = base.attention_factor_for(base.max_length)
        elif args.attention_factor is not None:
            value = float(args.attention_factor)
        elif problem.stage == "first":
            policy = "su"
            value = base.attention_factor_by(policy, problem.target_length)
        elif problem.stage == "second" and _has_the_policys(base):
            # Under the tuned window's value a second search loses to YaRN (docs/search.md).
            value = base.attention_factor_by(policy, problem.target_length)
        else:
            return problem
        return problem.with_attention(value, policy)


def _check_tokens(args: SearchOptions, checkpoint: Checkpoint) -> None:
    """Refuse data of another tokenizer than the model's, and sets of different ones.

    Raises:
        LongRopeError: Their manifests say so.
    """
    manifests = []
    for prefix in filter(None, (args.data, args.held_out)):
        manifests.append(read_manifest(prefix))
        check_vocabulary(
            manifests[-1]["vocab_size"], f"the tokenizer of {prefix}",
            checkpoint.shape, checkpoint.directory,
        )  # fmt: skip
        # Ids that the model has may still be those of other words.
        if args.hf and (loaded := tokenizer_of(manifests[-1], args.tokenizer)):
            check_same_tokens(loaded, f"the tokenizer of {prefix}", Path(args.hf))
    if len({item["tokenizer_sha256"] for item in manifests} - {None}) > 1:
        raise LongRopeError(
            f"--data {args.data} and --held-out {args.held_out} were made with different tokenizers"
            f" ({' and '.join(item['tokenizer'] for item in manifests)}); prepare both with the "
            "model's"
        )


def _has_the_policys(base: LongRopeConfig) -> bool:
    """Whether the one value for every window is the policy's for the longest, and nobody's own."""
    value = base.attention_factor_by(base.attention_factor_policy, base.max_length)
    return base.attention_factor is not None and math.isclose(
        base.attention_factor, value, rel_tol=1e-6
    )


def num_journaled(journal: Path) -> int:
    """Count the evaluations in a journal, those of references aside."""
    with contextlib.suppress(OSError):
        return len(read_records(journal))
    return 0
