"""Continuing prompts for lm-evaluation-harness; imports lm_eval."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from megatron_longrope.data.tokenizer import Tokenizer, decode_generated
from megatron_longrope.engine import Engine
from megatron_longrope.errors import LongRopeError

# Those of sampling change nothing where it is off.
_ARGUMENTS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


def packed(tokens: Iterable[int]) -> bytes:
    """Tokens with four bytes each: a tuple takes nine times as much, and tasks hold millions."""
    return array("i", tokens).tobytes()


def unpacked(data: bytes) -> torch.Tensor:
    """The inverse of :func:`packed`: `[n]`, int64."""
    return torch.tensor(array("i", data), dtype=torch.int64)


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt."""

    max_new_tokens: int
    """At most so many tokens."""
    stop: tuple[str, ...]
    """Texts that end the continuation and are no part of it."""

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], max_new_tokens: int) -> Decoding:
        """From the generation arguments of a task.

        Args:
            arguments (Mapping): lm-eval's `generation_kwargs`.
            max_new_tokens (int): Where they name no limit.

        Raises:
            LongRopeError: It is to be sampled, or an argument that this model does not know.
        """
        values = dict(normalize_gen_kwargs(dict(arguments), max_new_tokens))
        if values.get("num_beams") == 1:  # as without it
            del values["num_beams"]
        unknown = sorted(values.keys() - _ARGUMENTS)
        if values.get("do_sample") or unknown:
            wanted = "do_sample" if values.get("do_sample") else unknown[0]
            raise LongRopeError(
                f"the task wants the generation argument {wanted}, which the Megatron engine does "
                "not have (it decodes greedily, up to until or max_gen_toks); convert the "
                "checkpoint to Hugging Face format and use lm-eval's hf model for this task"
            )
        return cls(
            values["max_gen_toks"],
            tuple(text for text in handle_stop_sequences(values["until"], eos=None) if text),
        )


@dataclass(frozen=True)
class Prompt:
    """A request to continue."""

    index: int
    """Place among the requests."""
    data: bytes
    """Its tokens, packed, already cut to what leaves room for the continuation."""
    decoding: Decoding
    """How."""

    @property
    def total(self) -> int:
        """Tokens of the prompt and of the longest continuation."""
        return len(self.data) // 4 + self.decoding.max_new_tokens


def generation_batches(
    prompts: Sequence[Prompt], rows_at_once: Callable[[int], int]
) -> list[Sequence[Prompt]]:
    """Prompts of equal length and settings together, longest first.

    Args:
        prompts (Sequence[Prompt]): In any order.
        rows_at_once (Callable): How many rows of so many tokens a batch may have.
    """

    def kind(prompt: Prompt) -> tuple:
        return -len(prompt.data), prompt.decoding.max_new_tokens, prompt.decoding.stop

    batches: list[Sequence[Prompt]] = []
    for _, group in groupby(sorted(prompts, key=kind), kind):
        alike = list(group)
        size = rows_at_once(alike[0].total)
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


def continuations(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt], factor_length: int
) -> list[str]:
    """The text after each prompt of a batch, up to its stop sequence or EOS.

    Prompts have one length and the same settings; `factor_length` is that whose factors they get.
    """
    from megatron_longrope.engine.generation import generate

    decoding = prompts[0].decoding
    # A stop sequence that was just completed lies in these last tokens: four bytes a character.
    tail = 4 * max(map(len, decoding.stop), default=0) + 4

    def stopped(new: list[int]) -> bool:
        end = decode_generated(tokenizer, new[-tail:])
        return any(stop in end for stop in decoding.stop)

    rows = generate(
        engine,
        torch.stack([unpacked(prompt.data) for prompt in prompts]),
        decoding.max_new_tokens,
        factor_length=factor_length,
        eos_ids=tokenizer.end_ids,
        stop=stopped if decoding.stop else None,
    )
    # Whatever ended the row, the text must end at the first stop sequence in it.
    texts = [decode_generated(tokenizer, row) for row in rows]
    return [postprocess_generated_text(text, list(decoding.stop), None) for text in texts]
