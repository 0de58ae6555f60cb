"""What the kinds of evaluation that make prompts from a tokenizer plan alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_longrope.data.tokenizer import Tokenizer, bos_name, decode_generated, load_tokenizer
from megatron_longrope.errors import LongRopeError
from megatron_longrope.evaluation.session import Cell, Plan
from megatron_longrope.evaluation.targets import (
    NamedModel,
    Target,
    check_tokenizer_fits,
    prompt_tokenizer,
    targets_at,
)

if TYPE_CHECKING:
    from megatron_longrope.engine import Engine
    from megatron_longrope.evaluation.kind import Row


@dataclass(frozen=True)
class Prompts:
    """Whom to ask, and in which tokens; see :func:`open_prompts`."""

    targets: Sequence[Target]
    """Models under their factors."""
    tokenizer: Tokenizer
    """Makes the prompts of all of them."""
    fields: Mapping[str, Any]
    """What every record has of seed and tokenizer."""

    def cell(self, target: Target, fields: Mapping[str, Any], num_new_tokens: int = 0) -> Cell:
        """Return the cell of one prompt, which is one forward pass of its length."""
        return Cell(target, {**fields, **self.fields}, {fields["length"]: 1}, num_new_tokens)

    def plan(
        self,
        cells: Sequence[Cell],
        measure: Callable[[Any, Mapping[str, Any]], Row],
    ) -> Plan:
        """Return the plan that gives each cell's fields to `measure`, and times it."""

        def timed(engine: Any, cell: Cell) -> Row:
            started = time.perf_counter()
            # What fills up a sequence under context parallelism may reach into another factor set.
            with engine.pinned(cell.fields["length"]):
                found = measure(engine, cell.fields)
            return {**found, "seconds": time.perf_counter() - started}

        return Plan(
            cells,
            timed,
            shared=True,
            trial=lambda engine, tokens: engine.answer(tokens, 1),
        )


def open_prompts(options: Any, models: Sequence[NamedModel], *, generate: bool = False) -> Prompts:
    """Check what the kinds share of their options, and load the tokenizer.

    Args:
        options (EvaluationOptions): With `tokenizer`, `bos` and `seed`.
        models (Sequence[NamedModel]): To be asked.
        generate (bool): Answers are generated, which EOS ends. Defaults to False.

    Raises:
        LongRopeError: A seed out of range, factors that do not cover a length, no tokenizer or
            another model's.
    """
    if options.seed < 0:
        raise LongRopeError(f"--seed {options.seed} must be at least 0")
    targets = targets_at(models, options.longrope_config, options.lengths)
    tokenizer = load_tokenizer(prompt_tokenizer(options.tokenizer, models), options.bos)
    what = f"tokenizer {tokenizer.path}"
    check_tokenizer_fits(tokenizer.vocab_size, tokenizer, what, models)
    fields = {
        "seed": options.seed,
        "tokenizer_sha256": tokenizer.sha256,
        "bos": bos_name(tokenizer.bos_id),
    }
    if generate:
        fields["eos"] = " ".join(map(str, tokenizer.end_ids)) or "none"
    return Prompts(targets, tokenizer, fields)


def generated_text(
    engine: Engine, tokenizer: Tokenizer, tokens: Sequence[int], num_new_tokens: int, length: int
) -> tuple[str, int]:
    """Continue a prompt greedily under the factors of a length that it may not fill.

    Returns:
        tuple[str, int]: The text, and the number of its tokens with EOS.
    """
    from megatron_longrope.engine.generation import generate

    (new,) = generate(
        engine,
        torch.tensor([tokens]),
        num_new_tokens,
        factor_length=length,
        eos_ids=tokenizer.end_ids,
    )
    return decode_generated(tokenizer, new), len(new)
