"""Search for rescale factors: space, operators, algorithms and journal (numpy only)."""

from megatron_longrope.search.evolution import EvolutionParameters, EvolutionSearch
from megatron_longrope.search.journal import Evaluation, Journal
from megatron_longrope.search.space import START_TOKENS, Candidate, SearchSpace

__all__ = [
    "START_TOKENS",
    "Candidate",
    "Evaluation",
    "EvolutionParameters",
    "EvolutionSearch",
    "Journal",
    "SearchSpace",
]
