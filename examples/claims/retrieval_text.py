"""Write documents that teach a small model to find a number again.

    python examples/claims/retrieval_text.py --output text/retrieval.jsonl --documents 20000

Each document states a few facts, a made-up name with a number, between sentences that say nothing,
and comes back to them in the statement's words or in others. Names and numbers are random and never
repeat beyond their document, so that looking back is the only way to know them. Lists and their
copies do the same with many facts close together. Runs of random words, numbers and signs that
follow twice give something to look back for at every token, from which a model learns to do it at
all. The wordings are many, and none of them is the one of `longrope eval passkey` or of the
searches' needles; tests/unit/test_claims.py compares them.
"""

import argparse
import json
import random
from pathlib import Path


def _words(text):
    return text.split()


# Sentences without a fact need not make sense.
SYLLABLES = _words("ba de fi go lu ma ne po ri su ta vo ke zi ha jo wu xa mi ro")
THINGS = _words(
    "gate lamp boat shelf wagon engine meter garden tower bridge mill parcel ticket room desk "
    "window ledger invoice sample crate valve cable router badge plate bottle record socket"
)
PROPERTIES = _words(
    "code weight price length total limit serial mark offset rate count port level index size"
)
ACTORS = _words("clerk pilot farmer nurse baker sailor tailor driver student painter guard cook")
ACTS = _words("carried repaired painted measured sold borrowed moved cleaned found counted")
LOOKS = _words("heavy old wet open empty broken dusty warm cheap narrow new lost painted full")
PLACES = _words("market harbour station village office cellar river forest kitchen library")
TIMES = (
    *("in the morning", "at noon", "late at night"),
    *("on Monday", "after the rain", "last winter"),
)
# A statement and how it is taken up again; {x} is what has the number {v}.
FACTS = (
    ("The {x} equals {v}.", "How much is it? The {x} equals {v}."),
    ("Our {x} was set to {v}.", "To which value? Our {x} was set to {v}."),
    ("Take down that {x} reads {v}.", "It was noted above that {x} reads {v}."),
    ("{x}: {v}.", "Repeat {x}: {v}."),
    ("{x} = {v}", "assert {x} = {v}"),
    ("They gave {x} the number {v}.", "Which one? They gave {x} the number {v}."),
    ("My {x} is {v}, do not lose it.", "Tell me about it again. My {x} is {v}."),
    ("Somebody wrote {v} on the {x}.", "So on the {x} one reads {v}."),
    ("The {x} is {v}. Note it down.", "And then? The {x} is {v}."),
    ("{v} is our {x}, and our {x} is {v}.", "Once more: our {x} is {v}."),
    ("Now every {x} is {v}.", "It was said that every {x} is {v}."),
    ("A {x} of {v} was ordered.", "The order said: {x} of {v}."),
    ("Write {v} for {x}; yes, {x} is {v}.", "Asked for it, they answer: {x} is {v}."),
    ("Every {x} is now {v}. So {v} it stays.", "And today? Every {x} is now {v}."),
)


def number(chance):
    """One to seven digits."""
    digits = chance.choice((1, 2, 3, 4, 5, 5, 5, 6, 7))
    return str(chance.randrange(10 ** (digits - 1), 10**digits))


def name(chance):
    """A made-up word, or one with a thing or a property, or a thing's property."""
    made_up = "".join(chance.choices(SYLLABLES, k=chance.choice((2, 3))))
    thing, kind = chance.choice(THINGS), chance.choice(PROPERTIES)
    return chance.choice((made_up, f"{made_up} {thing}", f"{made_up} {kind}", f"{thing} {kind}"))


def sentence(chance):
    """A sentence without a fact."""
    return (
        f"A {chance.choice(ACTORS)} {chance.choice(ACTS)} a {chance.choice(THINGS)} "
        f"near our {chance.choice(PLACES)} {chance.choice(TIMES)}."
    )


def description(chance):
    """A short sentence with the words of facts before its end, which is no number."""
    start = chance.choice(("The", "Our", "My", "Every", "This"))
    thing = chance.choice(THINGS) + chance.choice(("", "", f" {chance.choice(PROPERTIES)}"))
    link = chance.choice(("is", "is", "is", "is", "was", "equals", "reads"))
    return f"{start} {thing} {link} {chance.choice(LOOKS)}."


def story(chance, most):
    """Facts between sentences, taken up again at the end.

    There are at most `most` sentences or 2.5 times as many descriptions, and in half of the
    documents just so many: a fact must also stand a window away from its question.
    """
    count = chance.choice((1, 1, 2, 3))
    facts = [(chance.choice(FACTS), name(chance), number(chance)) for _ in range(count)]
    parts = [fact[0].format(x=x, v=v) for fact, x, v in facts]
    make = chance.choice((sentence, description))
    most = most * 5 // 2 if make is description else most
    filler = [make(chance) for _ in range(chance.choice((1, 2, 4, 8)))]
    parts += (filler * most)[
        : chance.choice((most, chance.randint(0, most)))
    ]  # they repeat themselves
    chance.shuffle(parts)
    asked = [fact[1].format(x=x, v=v) for fact, x, v in chance.sample(facts, len(facts))]
    return chance.choice((" ", "\n")).join(parts + asked)


def table(chance):
    """A list of names with numbers, and the same once more in another order."""
    rows = [(name(chance), number(chance)) for _ in range(chance.randint(3, 7))]
    form = chance.choice(("{} {}", "{}: {}", "{} -> {}", "('{}', {})", "{} is {}", "{} is {},"))
    lines = [form.format(*row) for row in rows]
    again = chance.sample(lines, len(lines))
    return "\n".join([*lines, chance.choice(("", "again", "sorted otherwise", "copy")), *again])


def copy(chance):
    """Random words, numbers and signs, and the same again."""
    words = (*SYLLABLES, *THINGS, *ACTORS, *PLACES, *"+-*/=.,:;()[]{}")
    makers = (lambda: chance.choice(words), lambda: number(chance), lambda: name(chance))
    makers = chance.choice((makers[:1], makers[1:2], makers))
    run = " ".join(chance.choice(makers)() for _ in range(chance.randint(4, 25)))
    return chance.choice((" ", "\n", " | ")).join([run] * chance.choice((2, 2, 3)))


def document(chance, most=10):
    """One of the three; `most` is the number of sentences without a fact."""
    make = chance.choice((story, story, story, table, copy))
    return make(chance, most) if make is story else make(chance)


def main():
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument(
        "--sentences", type=int, default=10, help="at most, around the facts (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"text": document(chance, args.sentences)}) + "\n" for _ in range(args.documents)
    )
    args.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
