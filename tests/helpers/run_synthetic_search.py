"""One rank of a search without a model, for tests under torchrun.

run_synthetic_search.py ALGORITHM JOURNAL [--lookahead G] [--seconds S] [--die REPLICA:SAMPLES]
    [--together]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from synthetic_search import Synthetic, small_problem

from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.factor_search.known_scores import Team
from megatron_longrope.factor_search.runner import SearchRun, run_search
from megatron_longrope.factor_search.trial_queue import shared_store

SMALL = EvolutionParameters(
    population_size=10, num_mutations=4, num_crossovers=4, max_iterations=4, num_parents=4
)


class Uneven(Synthetic):
    """A replica that is slower than the first one, and may die.

    With `together` the first one begins when another has: on a busy machine it might else have
    done everything before.
    """

    def __init__(
        self, team: Team, seconds: float, die_after: int | None, together: bool, **options
    ) -> None:
        super().__init__(seconds=seconds * (1 + 2 * team.index), **options)
        self._team, self._die_after, self._together = team, die_after, together

    def losses(self, config, first):
        if self._together and self.calls == 0:
            if self._team.index == 0:
                self._team.store.wait(["another has begun"])
            else:
                self._team.store.set("another has begun", "")
        if self._die_after is not None and self.calls >= self._die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(config, first)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=("evolution", "cma"))
    parser.add_argument("journal", type=Path)
    parser.add_argument("--lookahead", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--die", default="")
    parser.add_argument("--together", action="store_true")
    args = parser.parse_args()
    team = Team()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        team = Team(dist.get_rank(), dist.get_world_size(), shared_store())
    replica, _, samples = args.die.partition(":")
    die_after = int(samples) if replica and int(replica) == team.index else None
    problem = small_problem()
    seeds = list(problem.seeds.values())
    if args.algorithm == "cma":
        parameters = CmaParameters(max_evaluations=40, num_samples=Synthetic.num_samples)
        search = CmaSearch(problem.space, parameters, seeds, 1, lookahead=args.lookahead)
    else:
        search = EvolutionSearch(problem.space, SMALL, seeds, 1, lookahead=args.lookahead)
    run = SearchRun(args.journal, {"seed": 1}, resume=True, team=team)
    objective = Uneven(team, args.seconds, die_after, args.together, noise=0.1)
    outcome = run_search(search, problem, objective, run)
    if team.index == 0:
        print(
            json.dumps(
                {
                    "factors": problem.factor_set(outcome.candidate).rescale_factors,
                    "score": outcome.score,
                    "evaluations": outcome.num_evaluations,
                    "scored_here": objective.calls,
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
