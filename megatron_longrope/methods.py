"""Published scaling methods: what they are called and how they look, everywhere."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A published method."""

    label: str
    """What tables and figures call it."""

    look: str
    """One of :data:`megatron_longrope.report.style.LOOKS`, the same in every figure."""


METHODS = {
    "none": Method("No extension", "ink"),
    "pi": Method("PI", "orange"),
    "ntk": Method("NTK", "sky"),
    "yarn": Method("YaRN", "green"),
}
"""Methods by the name that `--baselines` knows, in the order in which they are listed."""
