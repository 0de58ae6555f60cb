"""A whole search as the command line asks for it: from its settings to the files it leaves."""

from __future__ import annotations

import argparse
import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_longrope.checkpoint.loader import Checkpoint
from megatron_longrope.config import LongRopeConfig, identity_config
from megatron_longrope.conversion.hf_checkpoint import open_checkpoint
from megatron_longrope.data.documents import read_manifest, read_window_documents
from megatron_longrope.data.tokenizer import bos_name, load_tokenizer
from megatron_longrope.engine import Engine
from megatron_longrope.frequencies import attention_factor
from megatron_longrope.ranks import rank
from megatron_longrope.search import outcome as outcome_files
from megatron_longrope.search.board import shared_store
from megatron_longrope.search.cma import CmaParameters, CmaSearch
from megatron_longrope.search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.search.ledger import Team
from megatron_longrope.search.needle import needle_samples
from megatron_longrope.search.objective import PerplexityObjective, TokenModel, window_samples
from megatron_longrope.search.problem import SearchProblem, make_problem
from megatron_longrope.search.racing import Race
from megatron_longrope.search.replicas import Replica
from megatron_longrope.search.runner import (
    SearchOutcome,
    SearchRun,
    run_search,
    score_references,
)
from megatron_longrope.search.space import START_TOKENS


@dataclass(frozen=True)
class SearchPlan:
    """Settings that were checked before any weight is loaded."""

    args: argparse.Namespace
    """The command line's options."""

    parameters: CmaParameters | EvolutionParameters
    """Sizes of the algorithm."""

    checkpoint: Checkpoint
    """Whose model is searched for; only its metadata has been read."""

    problem: SearchProblem
    """What is searched, under the base's attention factor."""

    race: Race
    """When candidates are given up."""

    samples: Mapping[str, Any]
    """Of :func:`read_samples`, for the search documents."""

    held_out: Mapping[str, Any] | None
    """The same for the held-out documents, if there are any."""

    @classmethod
    def from_options(
        cls, args: argparse.Namespace, parameters: CmaParameters | EvolutionParameters
    ) -> SearchPlan:
        """Check everything that can be checked without the model.

        Raises:
            ValueError: Something does not fit; one sentence says what.
        """
        if min(args.num_samples, args.windows_per_document) < 1:
            raise ValueError("--num-samples and --windows-per-document must be at least 1")
        if args.objective == "needle" and args.windows_per_document > 1:
            raise ValueError("--windows-per-document has no meaning with --objective needle")
        if args.tensorboard_dir and Path(args.tensorboard_dir).is_file():
            raise ValueError(
                f"--tensorboard-dir {args.tensorboard_dir} is a file; name a directory"
            )
        if Path(args.output).is_dir():
            raise ValueError(f"--output {args.output} is a directory; name a JSON file")
        checkpoint = open_checkpoint(args.load, args.hf, args.iteration)
        problem = make_problem(
            _base(args, checkpoint),
            args.target_length,
            upper=args.upper,
            start_tokens=_start_tokens(args.start_tokens),
            space=args.space,
            critical_dimension=args.critical_dimension,
        )
        samples = read_samples(args, args.data)
        if isinstance(parameters, CmaParameters):
            parameters = replace(parameters, num_samples=len(samples["tokens"]))
        race = Race(args.racing, args.racing_significance)
        held_out = read_samples(args, args.held_out) if args.held_out else None
        plan = cls(args, parameters, checkpoint, problem, race, samples, held_out)
        _algorithm(plan, problem)  # seeds that do not fit its sizes
        return plan

    @property
    def journal(self) -> Path:
        """Where evaluations are recorded."""
        return Path(self.args.output).with_suffix(".journal.jsonl")

    def num_journaled(self) -> int:
        """Evaluations in the journal."""
        with contextlib.suppress(OSError):
            return max(0, self.journal.read_bytes().count(b"\n") - 1)
        return 0

    def estimate(self, gpu: str, num_gpus: int | None, mfu: float) -> Sequence[str]:
        """FLOPs, memory and hours in words; see :mod:`.cost`."""
        from megatron_longrope.plan.hardware import parse_gpu
        from megatron_longrope.search.cost import estimate_command

        args = self.args
        model_ranks = args.tensor_model_parallel_size * args.context_parallel_size
        count = len(self.samples["tokens"])
        forwards = _algorithm(self, self.problem).total_samples(count)
        gpus = num_gpus or model_ranks
        if gpus % model_ranks:
            raise ValueError(
                f"--num-gpus {gpus} is not a multiple of tensor parallel x context parallel = "
                f"{model_ranks}"
            )
        return estimate_command(
            args,
            self.checkpoint.shape,
            samples=count,
            evaluations=-(-forwards // count),
            gpus=gpus,
            gpu=parse_gpu(gpu),
            utilisation=mfu,
        ).lines()

    def run(self, engine: Engine) -> tuple[SearchProblem, SearchOutcome] | None:
        """Search, and write the winner with what is known about it.

        Args:
            engine (Engine): This rank's part of the model, loaded with `replicas=True`.

        Returns:
            tuple[SearchProblem, SearchOutcome]: What was searched, its attention factor settled,
                and what was found; None on every rank but the first.
        """
        args = self.args
        replica = Replica(engine, args.tensor_model_parallel_size * args.context_parallel_size)
        store = shared_store() if replica.count > 1 else None
        if not replica.is_leader:
            replica.serve()
            return None
        try:
            return self._lead(replica, Team(replica.index, replica.count, store))
        finally:
            replica.close()

    def _lead(self, model: TokenModel, team: Team) -> tuple[SearchProblem, SearchOutcome] | None:
        args = self.args
        objective = self._objective(model, self.samples)
        settings = self._settings()
        run = SearchRun(
            self.journal, settings, self.race, args.resume, args.overwrite, team,
            Path(args.tensorboard_dir) if args.tensorboard_dir else None,
        )  # fmt: skip
        problem, references, policy_scores = self._score_references(objective, run)
        attention = [problem.base.attention_factor, problem.base.attention_factor_policy]
        run = replace(run, settings={**settings, "attention": attention})
        outcome = run_search(
            _algorithm(self, problem), problem, objective, run, known=references.records
        )
        if rank() != 0:
            return None
        origin = {
            "method": f"longrope-{args.algorithm}",
            "stage": problem.stage,
            "scale": problem.space.scale,
            "search_perplexity": outcome.score,
            "seed_perplexity": outcome.seed_scores,
            "policy_perplexity": policy_scores,
            "evaluations": outcome.num_evaluations,
            "failed_evaluations": outcome.num_failed,
            "sample_forwards": outcome.sample_forwards,
            "sample_forwards_saved": outcome.sample_forwards_saved,
            **{key: value for key, value in settings.items() if key != "base"},
            "racing": self.race.rule,
            "date": datetime.date.today().isoformat(),
            "versions": outcome_files.versions(),
        }
        held_out = {}
        if self.held_out is not None:
            other = self._objective(model, self.held_out)
            held_out = outcome_files.scores_on(other, problem, outcome.candidate)
            origin["held_out_perplexity"] = held_out
            origin["held_out_sha256"] = read_manifest(args.held_out)["token_sha256"]
        outcome_files.write(args.output, problem, outcome, origin)
        outcome_files.print_summary(args.output, problem, outcome, held_out)
        return problem, outcome

    def _objective(self, model: TokenModel, samples: Mapping[str, Any]) -> PerplexityObjective:
        return PerplexityObjective(
            model,
            samples["tokens"],
            scored=samples["scored"],
            tokens_per_forward=self.args.tokens_per_forward,
        )

    def _settings(self) -> dict[str, Any]:
        """What a resumed search must agree on, and what a result's provenance names."""
        args, space = self.args, self.problem.space
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
            "upper": space.max_step,
            "seed": args.seed,
            "objective": args.objective,
            "num_samples": args.num_samples,
            "windows_per_document": args.windows_per_document,
            "needles": self.samples["description"],
            "tokens_per_forward": args.tokens_per_forward,
            "data_sha256": read_manifest(args.data)["token_sha256"],
            "bos": self.samples["bos"],
            "checkpoint": str(self.checkpoint.directory),
            "dtype": args.dtype,
        }

    def _score_references(
        self, objective: PerplexityObjective, run: SearchRun
    ) -> tuple[SearchProblem, SearchOutcome, dict[str, Any]]:
        """Score the references, under both policies when the attention factor is left open.

        Returns:
            tuple: The problem with its attention factor, the references' scores under it, and all
            scores by policy (empty when it was not left open).
        """
        args, base = self.args, self.problem.base
        if args.attention_factor == "longest":
            value = base.attention_factor_for(base.max_length)
            problem = self.problem.with_attention(value, base.attention_factor_policy)
        elif args.attention_factor is not None:
            value = float(args.attention_factor)
            problem = self.problem.with_attention(value, base.attention_factor_policy)
        elif args.attention_factor_policy in ("su", "yarn", "none"):
            problem = self.problem.with_attention(None, args.attention_factor_policy)
        elif args.attention_factor_policy == "auto" or self.problem.stage == "first":
            return self._choose_policy(objective, run)
        else:
            problem = self.problem
        attention = [problem.base.attention_factor, problem.base.attention_factor_policy]
        run = replace(run, settings={**run.settings, "attention": attention})
        return problem, score_references(problem, objective, run, "references"), {}

    def _choose_policy(
        self, objective: PerplexityObjective, run: SearchRun
    ) -> tuple[SearchProblem, SearchOutcome, dict[str, Any]]:
        """The policy under which the best reference is best, as one value for every window."""
        base, outcomes = self.problem.base, {}
        original, target = base.original_max_position_embeddings, self.problem.target_length
        for policy in ("su", "none"):
            # One value is what Hugging Face's longrope and every reader of it can hold.
            value = attention_factor(policy, target / original, original)
            problem = self.problem.with_attention(value, policy)
            part = replace(run, settings={**run.settings, "attention": [value, policy]})
            outcome = score_references(problem, objective, part, f"policy {policy}")
            outcomes[policy] = problem, outcome
        best = min(outcomes, key=lambda policy: outcomes[policy][1].score)
        table = {policy: outcome.seed_scores for policy, (_, outcome) in outcomes.items()}
        return *outcomes[best], table


def read_samples(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Samples of a data set: `tokens`, `scored` (None: all), `description` of needles, `bos`.

    Raises:
        ValueError: Too few documents are long enough, or the tokenizer does not fit.
    """
    windows, length = args.windows_per_document, args.target_length
    documents, bos_id = read_window_documents(
        prefix, length, args.num_samples, windows=windows, bos=args.bos
    )
    if args.objective == "ppl":
        tokens = window_samples(documents, bos_id, length, windows)
        return {"tokens": tokens, "scored": None, "description": None, "bos": bos_name(bos_id)}
    if args.tokenizer is None:
        raise ValueError("--objective needle writes text into documents: give their --tokenizer")
    tokenizer, manifest = load_tokenizer(args.tokenizer), read_manifest(prefix)
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"{args.tokenizer} is not the tokenizer that {prefix} was made with "
            f"({manifest['tokenizer']}); give that one"
        )
    samples = needle_samples(
        documents, tokenizer, length, bos_id=bos_id,
        depths=_depths(args.needle_depths), seed=args.seed,
    )  # fmt: skip
    return {
        "tokens": samples.tokens,
        "scored": samples.scored,
        "description": samples.describe(),
        "bos": bos_name(bos_id),
    }


def _algorithm(plan: SearchPlan, problem: SearchProblem) -> CmaSearch | EvolutionSearch:
    args, seeds = plan.args, list(problem.seeds.values())
    if isinstance(plan.parameters, CmaParameters):
        return CmaSearch(problem.space, plan.parameters, seeds, args.seed, lookahead=args.lookahead)
    return EvolutionSearch(
        problem.space, plan.parameters, seeds, args.seed,
        max_evaluations=args.max_evaluations, lookahead=args.lookahead,
    )  # fmt: skip


def _base(args: argparse.Namespace, checkpoint: Checkpoint) -> LongRopeConfig:
    """What the search extends: given factors, the model's own, or plain RoPE.

    Raises:
        ValueError: An option contradicts them.
    """
    if args.attention_factor not in (None, "longest"):
        try:
            float(args.attention_factor)
        except ValueError:
            raise ValueError(
                f"--attention-factor {args.attention_factor!r} must be a number or `longest`"
            ) from None
    shape, stored = checkpoint.shape, checkpoint.longrope
    if args.base_config and args.base_config != "none":
        base, whose = LongRopeConfig.load(args.base_config), f"--base-config {args.base_config}"
    elif stored and not args.base_config:
        base, whose = stored, f"{checkpoint.directory}"
        if rank() == 0:
            windows = ", ".join(str(item.max_length) for item in stored.factor_sets)
            print(
                f"the base is the model's own factors, for {windows} tokens (attention factor "
                f"{stored.attention_factor_for(stored.max_length):.6g} at the longest); "
                "--base-config none would search from plain RoPE",
                flush=True,
            )
    else:
        original = args.original_length or (
            stored.original_max_position_embeddings if stored else shape.max_position_embeddings
        )
        base, whose = identity_config(shape.rotary_base, shape.rotary_dim, original), "plain RoPE"
    original = base.original_max_position_embeddings
    if args.original_length not in (None, original):
        raise ValueError(
            f"--original-length {args.original_length} contradicts {whose}, made for {original}; "
            "leave it out"
        )
    if args.attention_factor == "longest" and base.max_length == original:
        raise ValueError(
            "--attention-factor longest takes the value that the model was tuned with, and plain "
            "RoPE has none: leave it out, or give the tuned model's --base-config"
        )
    return base


def _start_tokens(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "paper":
        return START_TOKENS
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(
            f"--start-tokens {text!r} must be integers, for example 0,2,4, or `paper`"
        ) from None


def _depths(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--needle-depths {text!r} must be numbers, for example 0,0.5,1") from None
