"""Search for rescale factors: space, algorithms, racing, journal and runner."""

from megatron_longrope.search.cma import CmaParameters, CmaSearch
from megatron_longrope.search.critical import CriticalSpace
from megatron_longrope.search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.search.journal import Evaluation, Journal
from megatron_longrope.search.racing import Race
from megatron_longrope.search.space import START_TOKENS, Candidate, SearchSpace

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
