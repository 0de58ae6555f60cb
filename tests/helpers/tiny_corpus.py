"""Made-up text with indentation and numbers, for the tests of this directory."""

WORDS = ["window", "rotary", "position", "context", "length", "factor", "search", "segment"]


def make_text(seed, words):
    lines = []
    for index in range(words // 5):
        picked = [WORDS[(seed * 7 + index * 3 + j * j) % len(WORDS)] for j in range(5)]
        lines.append("    " * (index % 4) + " ".join(picked) + f" {seed * 100 + index}")
    return "\n".join(lines) + "\n"
