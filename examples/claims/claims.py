"""Write docs/claims.md: what the runs of `make claims` say about each claim.

    python examples/claims/claims.py --results docs/results/claims --output docs/claims.md

Every comparison is paired: the same documents, or the same passkeys, under both. Its interval is
Student's at 95 %, over the units and, where there are several, over the seeds; the wider one
decides. A claim is shown when all of its comparisons are above zero, the reverse when all are
below, and not shown otherwise. Where neither side finds a passkey there is nothing to compare.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from measured import NotRun, Results, read_results

from megatron_longrope.evaluation.statistics import ratio_interval

SCALES, WINDOW, TARGET = (2, 4, 8), 256, 2048
SECOND = (4, 8, 16)  # of the tuned window
RIVALS = {"pi": "PI", "ntk": "NTK", "yarn": "YaRN"}
VARIANTS = ("joint", "needle", "full", "critical", "start_tokens")
BASE = ("untuned", "base", "checkpoint")  # as it is, without a factor file
SECOND_BASE = ("second", "base", "checkpoint")  # of the run that the second searches are of
RETRIEVES = 0.8  # passkeys inside the window, of a base model whose passkeys mean something
NOT_SHOWN = "Not shown at this size"
LOST = 0.01  # nats: what may be lost inside the window before it counts


@dataclass
class Comparison:
    """What one choice gains over another."""

    name: str
    ours: float
    theirs: float
    gain: float
    low: float
    high: float
    form: Callable[[float], str]

    @property
    def verdict(self) -> int:
        """1 where it is above zero for certain, -1 where below, 0 otherwise."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def is_empty(self) -> bool:
        """Whether neither side finds a passkey."""
        return self.form is share and self.ours == self.theirs == 0


def interval(values: list[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of a mean; for a single value the value itself."""
    return ratio_interval(values, [1.0] * len(values)) or (values[0], values[0])


def perplexity(nats: float) -> str:
    """Write a loss as perplexity."""
    return f"{math.exp(nats):.2f}"


def share(value: float) -> str:
    """Write a share in percent."""
    return f"{100 * value:.0f} %"


def compare(name, ours, theirs, *, higher_is_better=False, margin=0.0) -> Comparison:
    """Compare runs of some seeds with others, or with one run without a seed.

    Args:
        name (str): What is compared, for the table.
        ours (list of lists): For each seed, a value for each unit.
        theirs (list of lists): The same, or a single list.
        higher_is_better (bool): Of passkeys; losses are better when lower.
        margin (float): What may be lost without being counted.
    """
    if len(theirs) == 1:
        theirs = theirs * len(ours)
    sign = 1 if higher_is_better else -1
    gains = [
        [sign * (x - y) + margin for x, y in zip(mine, other, strict=True)]
        for mine, other in zip(ours, theirs, strict=True)
    ]
    bounds = [interval([statistics.mean(row) for row in zip(*gains, strict=True)])]
    if len(gains) > 1:
        bounds.append(interval([statistics.mean(row) for row in gains]))
    elif len(gains[0]) == 1:
        bounds = [(-math.inf, math.inf)]  # a single figure says nothing of others
    return Comparison(
        name,
        statistics.mean(statistics.mean(row) for row in ours),
        statistics.mean(statistics.mean(row) for row in theirs),
        statistics.mean(statistics.mean(row) for row in gains),
        min(low for low, _ in bounds),
        max(high for _, high in bounds),
        share if higher_is_better else perplexity,
    )


def retrieves(results):
    """Whether the base model finds passkeys inside its window; it is assumed to until measured."""
    return statistics.mean(results.found.get((*BASE, WINDOW), [1.0])) >= RETRIEVES


def compare_both(results, name, cells):
    """Compare by perplexity and, if the base model finds any, by passkeys.

    Args:
        results (Results): The records.
        name (str): What is compared, for the table.
        cells (list of lists): Keys of ours, and of theirs.
    """
    tables = {"perplexity": results.losses, "passkeys": results.found}
    for what, table in tables.items():
        if what == "perplexity" or retrieves(results):
            ours, theirs = ([table[key] for key in keys] for keys in cells)
            yield compare(f"{name}, {what}", ours, theirs, higher_is_better=what == "passkeys")


def against_methods(results, scale):
    """Claim 1 at one scale, by perplexity and by passkeys."""
    place, length = ("untuned", "base"), WINDOW * scale
    ours = [(*place, seed, length) for seed in results.seeds(f"ppl_{scale}x")]
    for key, label in RIVALS.items():
        theirs = [(*place, f"{key}_{scale}x", length)]
        yield from compare_both(results, f"{scale}x, {label}", [ours, theirs])


def random_start(results):
    """Claim 2: each method against random candidates, the search against the best of them."""
    place = ("random", "base")
    drawn = {key: nats for key, nats in results.losses.items() if key[2].startswith("random")}
    if not drawn:
        raise NotRun("random")
    # Candidates are the units here: how much better is a method than one that is drawn blindly?
    means = [statistics.mean(nats) for nats in drawn.values()]
    for key, label in RIVALS.items():
        seed = statistics.mean(results.losses[*place, f"{key}_8x", TARGET])
        name = f"{label} as published, against random factors"
        yield compare(name, [[seed] * len(means)], [means])
    ours = [results.losses[*place, name, TARGET] for name in results.seeds("ppl_8x")]
    yield compare("search against the best random", ours, [min(drawn.values(), key=sum)])


def over_seeds(results, scale):
    """Claim 2 at one scale: the search against the best that it started from."""
    searches = [results.searches[name] for name in results.seeds(f"ppl_{scale}x")]
    texts = (
        ("search against the best of its starts, search text", "seed_", "search"),
        # near-ntk, a start, has no score on held-out text.
        ("search against the best method, held-out text", "held_out_", "held_out_longrope"),
    )
    for name, start, own in texts:
        ours = [[math.log(search[own])] for search in searches]
        others = [[v for k, v in s.items() if k.startswith(start) and k != own] for s in searches]
        theirs = [[math.log(min(values))] for values in others]
        yield compare(f"{scale}x, {name}", ours, theirs)


def tuned(results, start, length=TARGET):
    """Cells of the fine-tunings of one kind, one for each seed."""
    return [("tuned", name, name, length) for name in results.fine_tunings(start)]


def tuned_against_methods(results):
    """Claim 4."""
    for key, label in RIVALS.items():
        cells = [tuned(results, start) for start in ("longrope", key)]
        yield from compare_both(results, label, cells)


def progressive(results):
    """Claim 5."""
    cells = [tuned(results, start) for start in ("progressive", "longrope")]
    yield from compare_both(results, "4x then 8x against 8x", cells)


def second(results, scale):
    """Claim 6 at one scale.

    YaRN multiplies the tuned attention factor by a temperature of its own; the searches are under
    LongRoPE's for the new window, and score YaRN's factors under that, too.
    """
    length = TARGET * scale
    names = results.seeds(f"second_{scale}x")
    ours = [results.losses["second", "second", name, length] for name in names]
    for key in ("pi", "yarn"):
        theirs = [results.losses["second", "second", key, length]]
        yield compare(f"{scale}x, {RIVALS[key]}", ours, theirs)
    searches = [results.searches[name] for name in names]
    cells = [
        [[math.log(row[f"held_out_{key}"])] for row in searches] for key in ("longrope", "yarn")
    ]
    yield compare(f"{scale}x, YaRN under our attention factor, first windows", *cells)


def recovery(results):
    """Claim 7."""
    cells = [
        [("second", "second", name, WINDOW) for name in results.seeds(kind)]
        for kind in ("recovered", "second_4x")
    ]
    yield from compare_both(results, f"{WINDOW} tokens, with recovery against without", cells)


def falling(results):
    """Claim 8."""
    for longer in (512, 1024, 2048):
        both = [tuned(results, "longrope", length) for length in (longer, longer // 2)]
        cells = [[results.losses[key] for key in keys] for keys in both]
        yield compare(f"{longer} tokens against {longer // 2}", *cells)


def retrieval(results, stage, length):
    """Claim 9 at one length: 90 % or more, as the paper has it."""
    if stage == "second":
        names = results.seeds(f"second_{length // TARGET}x")
        cells = [("second", "second", name, length) for name in names]
    else:
        cells = tuned(results, "longrope", length)
    ours = [results.found[key] for key in cells]
    units = [[0.9] * len(ours[0])]
    yield compare(f"{length} tokens, against 90 %", ours, units, higher_is_better=True)


def against_base(results, what, ours, base):
    """Claim 10: the base model at its window, with what may be lost."""
    name = f"{WINDOW} tokens, {what}, against the base model and {100 * LOST:.0f} %"
    return compare(name, ours, [results.losses[*base, WINDOW]], margin=LOST)


def inside_untuned(results):
    """Claim 10 before tuning: the factors of 8 times the window, at the window itself."""
    place = ("untuned", "base")
    ours = [results.losses[*place, name, WINDOW] for name in results.seeds("ppl_8x")]
    yield against_base(results, "not tuned", ours, BASE)


def inside_tuned(results):
    """Claim 10 after tuning, second search and recovery."""
    names = results.seeds("recovered")
    ours = [results.losses["second", "second", name, WINDOW] for name in names]
    yield against_base(results, "recovered", ours, SECOND_BASE)


def ablation(results, variant):
    """A variant of the search against the default one at 8 times the window."""
    place = ("ablations", "base")
    cells = [
        [(*place, name, TARGET) for name in results.seeds(f"{kind}_8x")]
        for kind in (variant, "ppl")
    ]
    yield from compare_both(results, variant, cells)


def tuning_ablation(results, ours, theirs, length, name):
    """One fine-tuning against another, with the orders of the data that both have."""
    rows = [tuned(results, start, length) for start in (ours, theirs)]
    seeds = [{cell[1].rpartition("_")[2] for cell in row} for row in rows]
    both = set.intersection(*seeds)
    cells = [[cell for cell in row if cell[1].rpartition("_")[2] in both] for row in rows]
    yield from compare_both(results, name, cells)


def limit(results, name):
    """Return the longest length at which perplexity is within 10 % of the window's."""
    base = statistics.mean(results.losses[*BASE, WINDOW])
    reached = WINDOW
    for scale in SCALES:
        names = results.seeds(f"ppl_{scale}x") if name == "ppl" else [f"{name}_{scale}x"]
        cells = [results.losses["untuned", "base", x, WINDOW * scale] for x in names]
        if statistics.mean(map(statistics.mean, cells)) <= base + math.log(1.1):
            reached = WINDOW * scale
    return reached


def limits(results):
    """Claim 3: the longest length that each reaches; a step of the grid more is a gain."""
    ours = limit(results, "ppl")
    for key, label in RIVALS.items():
        theirs = limit(results, key)
        gain = float(math.log2(ours / theirs))
        yield Comparison(
            f"{label}, tokens reached (gain in doublings)",
            ours,
            theirs,
            gain,
            gain,
            gain,
            "{:.0f}".format,
        )


# Number, sentence, and what is compared. A gain is positive where the claim holds.
CLAIMS = [
    (
        "1",
        "Without fine-tuning, searched factors beat PI, NTK and YaRN at 2, 4, 8 times the window",
        [partial(against_methods, scale=scale) for scale in SCALES],
    ),
    (
        "2",
        "PI, NTK and YaRN beat random factors, and the search beats all of them, at equal forwards",
        [*(partial(over_seeds, scale=scale) for scale in SCALES), random_start],
    ),
    (
        "3",
        "Without fine-tuning, they reach further (perplexity within 10 % of the window's)",
        [limits],
    ),
    (
        "4",
        "After equally many steps at 8 times the window, LongRoPE beats PI, NTK and YaRN",
        [tuned_against_methods],
    ),
    ("5", "4 times and then 8 times beats 8 times at once, at equal steps", [progressive]),
    (
        "6",
        "The second search beats PI and YaRN on the tuned model, without training",
        [partial(second, scale=scale) for scale in SECOND],
    ),
    ("7", "A recovery search wins back the original window", [recovery]),
    ("8", "On long documents perplexity falls with length, up to the tuned window", [falling]),
    (
        "9",
        "Passkeys are found up to the target (90 % or more)",
        [
            *(partial(retrieval, stage="tuned", length=length) for length in (1024, 2048)),
            *(partial(retrieval, stage="second", length=length) for length in (8192, 16384)),
        ],
    ),
    (
        "10",
        f"Inside the window nothing is lost (at most {100 * LOST:.0f} % of perplexity)",
        [inside_untuned, inside_tuned],
    ),
    (
        "11",
        "Ablations: other objectives, spaces and start tokens beat the default search at 8 times",
        [partial(ablation, variant=variant) for variant in VARIANTS],
    ),
    (
        "12",
        "Ablation: text as long as the target tunes better than text of half its length",
        [
            partial(
                tuning_ablation,
                ours="longrope",
                theirs="shorter",
                length=TARGET,
                name="2048 tokens",
            )
        ],
    ),
    (
        "13",
        "Ablation: mixed windows (LongRoPE2) beat one window, at 256 and at 2048 tokens",
        [
            partial(
                tuning_ablation,
                ours="mixed",
                theirs="longrope",
                length=length,
                name=f"{length} tokens",
            )
            for length in (WINDOW, TARGET)
        ],
    ),
]


# What a reader must know of a claim's comparisons that the introduction does not say.
NOTES = {
    "2": "A search starts from PI, NTK and YaRN as published, and from `near-ntk`, NTK's factors "
    "raised to what the default space holds, which has no score on held-out text. The random "
    "factors are from the whole of [1, 1.25 s], sorted; the searches have a floor of s from the "
    "critical dimension on.",
    "3": f"Lengths are multiples of the window of {WINDOW} tokens, judged by the mean over "
    "documents and seeds, so that there is no interval.",
    "9": "Theirs is the constant of 90 %, not a measurement.",
}


def costs_of_ablations(results: Results) -> str:
    """Return what the searches of claim 11 cost, which is not the same for all."""
    names: dict[float, list[str]] = {}
    for variant in ("ppl", *VARIANTS):
        cost = results.searches[results.seeds(f"{variant}_8x")[0]]["sample_forwards"]
        names.setdefault(cost, []).append("the default" if variant == "ppl" else f"`{variant}`")
    costs = [f"{cost:.0f} ({', '.join(kinds)})" for cost, kinds in names.items()]
    return f"Sample-forwards of a search: {'; '.join(costs)}."


def judge(results: Results, parts: Iterable) -> tuple[str, list[Comparison], int]:
    """Return the verdict, the comparisons that were run, and how many parts were not."""
    found, missing = [], 0
    for part in parts:
        try:
            found += list(part(results))
        except NotRun:
            missing += 1
    if not found:
        return "Not run yet", found, missing
    if missing:
        return "Partly run", found, missing
    verdicts = {item.verdict for item in found if not item.is_empty}
    word = {(1,): "Shown", (-1,): "The reverse"}.get(tuple(verdicts), NOT_SHOWN)
    return word, found, missing


def sentence(results: Results, parts: Iterable) -> str:
    """Return the verdict with its numbers."""
    verdict, found, _ = judge(results, parts)
    if not found:
        return f"**{verdict}.**"
    counted = [item for item in found if not item.is_empty]
    counts = {sign: sum(item.verdict == sign for item in counted) for sign in (1, 0, -1)}
    # What decides: of a claim that is not shown, the last that is against it or open.
    signs = (-1, 0, 1) if verdict == NOT_SHOWN else (1, -1, 0)
    last = min(reversed(counted or found), key=lambda item: signs.index(item.verdict))
    empty = len(found) - len(counted)
    rest = f" In {empty} more neither side finds a passkey." if empty else ""
    return (
        f"**{verdict}**: of {len(counted)} comparisons {counts[1]} are for it, {counts[-1]} "
        f"against it, {counts[0]} open; {last.name}: "
        f"{last.form(last.ours)} and {last.form(last.theirs)}.{rest}"
    )


def rows(found: list[Comparison]) -> list[str]:
    """Return a Markdown table of comparisons."""
    lines = [
        "| compared with | ours | theirs | gain | 95 % interval | |",
        "|---|---|---|---|---|---|",
    ]
    for item in found:
        word = {1: "for", 0: "open", -1: "against"}[item.verdict]
        word = "none found" if item.is_empty else word
        scale = f"{item.low:+.3f} to {item.high:+.3f}" if math.isfinite(item.low) else "one figure"
        lines.append(
            f"| {item.name} | {item.form(item.ours)} | {item.form(item.theirs)} | {item.gain:+.3f} "
            f"| {scale} | {word} |"
        )
    return lines


def base_model(results: Results) -> str:
    """Return what the base model can do inside its window."""
    try:
        found = results.found[*BASE, WINDOW]
        nats = statistics.mean(results.losses[*BASE, WINDOW])
    except NotRun:
        return "The base model has not been measured yet."
    words = "retrieves" if retrieves(results) else "does **not** retrieve"
    rest = "" if retrieves(results) else " So methods are compared by perplexity alone."
    return (
        f"The base model {words} inside its window of {WINDOW} tokens: it finds "
        f"{sum(found):.0f} of {len(found)} passkeys, at a perplexity of "
        f"{perplexity(nats)} on held-out text.{rest}"
    )


INTRODUCTION = """\
# Does it give what the paper says?

`make claims` ([Snakefile](../examples/claims/Snakefile)) tests claims of LongRoPE and LongRoPE2
on a Llama-type model of about a million parameters that is taught to find numbers again. This page
is written by [claims.py](../examples/claims/claims.py) from [records](results/claims); nothing is
typed by hand.

{base} {about}

Gains are nats per token for perplexity (0.010 is 1 %) and shares for passkeys; above zero is for
the claim. A document's loss is the mean over its tokens, in windows side by side.

Both sides saw the same documents or passkeys. The interval is the wider of those over
documents (or passkeys) and over seeds: three of each search, {tuning} of the order of a
fine-tuning's data, one of the base model. A claim is shown when all
of its comparisons are above zero, the reverse when all are below, partly run when some are missing.
Comparisons in which neither side finds a passkey count for nothing. At this size a claim that is
not shown says little about a large model.
[What was run](../examples/claims/README.md#what-was-run) says how these records were made.
"""


def page(results: Results) -> str:
    """Return docs/claims.md."""
    try:
        tuning = len(results.fine_tunings("longrope"))
    except NotRun:
        tuning = "none"
    about = results.about.get("text", "")
    text = [INTRODUCTION.format(base=base_model(results), about=about, tuning=tuning)]
    text += ["| | claim | |", "|---|---|---|"]
    for number, claim, parts in CLAIMS:
        text.append(f"| {number} | {claim} | {judge(results, parts)[0]} |")
    for number, claim, parts in CLAIMS:
        _, found, _ = judge(results, parts)
        text += ["", f"## {number}. {claim}", "", sentence(results, parts)]
        text += ["", NOTES[number]] if number in NOTES else []
        text += ["", costs_of_ablations(results)] if number == "11" and found else []
        text += ["", *rows(found)] if found else []
    return "\n".join(text) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="what collect.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.write_text(page(read_results(args.results)))


if __name__ == "__main__":
    main()
