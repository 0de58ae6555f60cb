"""Sizes of a search that cannot be are refused by their name and value."""

import math
from functools import partial

import pytest

from megatron_longrope.factor_search.cma import CmaParameters
from megatron_longrope.factor_search.critical import CriticalSpace
from megatron_longrope.factor_search.evolution import EvolutionParameters
from megatron_longrope.factor_search.space import SearchSpace

SPACE = partial(SearchSpace, 4, 2.0)
CRITICAL = partial(CriticalSpace, 4, 2.0)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SPACE, {"upper": 1.005}, "upper is 1.005; it must be at least 1 [+] step = 1.01"),
        (SPACE, {"upper": math.nan}, "upper is nan"),
        (SPACE, {"start_tokens": (-1,)}, r"start_tokens\[0\] is -1"),
        (SPACE, {"floor_dimension": -1}, "floor_dimension is -1; it must be .* not negative"),
        (
            SPACE,
            {"floor_dimension": 4},
            "floor_dimension is 4; it must be below rotary_dim",
        ),
        (SPACE, {"floor_dimension": 1, "upper": 1.5}, "upper is 1.5, below the extension ratio 2"),
        (CRITICAL, {"critical_dimensions": (-1,)}, r"critical_dimensions\[0\] is -1"),
        (CRITICAL, {"upper": 1.5}, "upper is 1.5, below 2.0, the smallest factor"),
        (CmaParameters, {"max_evaluations": 0}, "max_evaluations is 0"),
        (CmaParameters, {"population_size": 3}, "population_size is 3"),
        (CmaParameters, {"initial_deviation": 0.0}, "initial_deviation is 0.0"),
        (CmaParameters, {"initial_deviation": math.inf}, "initial_deviation is inf"),
        (CmaParameters, {"num_samples": 0}, "num_samples is 0"),
        (EvolutionParameters, {"population_size": 0}, "population_size is 0"),
        (EvolutionParameters, {"num_mutations": -1}, "num_mutations is -1"),
        (EvolutionParameters, {"num_crossovers": 1.5}, "num_crossovers is 1.5"),
        (EvolutionParameters, {"max_iterations": -1}, "max_iterations is -1"),
        (EvolutionParameters, {"num_parents": 0}, "num_parents is 0"),
        (EvolutionParameters, {"mutation_prob": 0.0}, "mutation_prob is 0.0"),
        (EvolutionParameters, {"mutation_prob": math.nan}, "mutation_prob is nan"),
        (EvolutionParameters, {"num_mutations": 0, "num_crossovers": 0}, "both 0"),
    ],
)
def test_a_bad_size_is_named_with_its_value(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
