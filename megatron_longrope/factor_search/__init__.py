"""Search for rescale factors: space, algorithms, racing, journal and runner.

Names are imported when they are first used, so that the command line reads a search's options
without scipy.
"""

from typing import TYPE_CHECKING

from megatron_longrope.lazy import importer

if TYPE_CHECKING:
    from megatron_longrope.factor_search.cma import CmaParameters, CmaSearch
    from megatron_longrope.factor_search.critical import CriticalSpace
    from megatron_longrope.factor_search.evolution import EvolutionParameters, EvolutionSearch
    from megatron_longrope.factor_search.journal import Evaluation, Journal
    from megatron_longrope.factor_search.racing import Race
    from megatron_longrope.factor_search.space import START_TOKENS, Candidate, SearchSpace

__all__ = [
    "START_TOKENS",
    "Candidate",
    "CmaParameters",
    "CmaSearch",
    "CriticalSpace",
    "Evaluation",
    "EvolutionParameters",
    "EvolutionSearch",
    "Journal",
    "Race",
    "SearchSpace",
]

__getattr__ = importer(
    __name__,
    {
        "START_TOKENS": "space",
        "Candidate": "space",
        "CmaParameters": "cma",
        "CmaSearch": "cma",
        "CriticalSpace": "critical",
        "Evaluation": "journal",
        "EvolutionParameters": "evolution",
        "EvolutionSearch": "evolution",
        "Journal": "journal",
        "Race": "racing",
        "SearchSpace": "space",
    },
)
