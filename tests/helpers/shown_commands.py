"""What the pages show to be typed."""

import re


def shown_commands(text):
    """Indented `longrope ...` and `torchrun ...` lines, continuation lines joined."""
    text = text.replace("\\\n", " ")
    return re.findall(r"^ {4,}((?:longrope|torchrun) .+)$", text, re.MULTILINE)
