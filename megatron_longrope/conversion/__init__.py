"""Megatron checkpoint <-> Hugging Face folder.

Names are imported when they are first used: torch alone takes seconds, and the command line reads
the options of a conversion without it.
"""

from typing import TYPE_CHECKING

from megatron_longrope.lazy import importer

if TYPE_CHECKING:
    from megatron_longrope.conversion.from_hf import ImportReport, write_checkpoint
    from megatron_longrope.conversion.to_hf import ConversionReport, write_hf_folder

__all__ = ["ConversionReport", "ImportReport", "write_checkpoint", "write_hf_folder"]

__getattr__ = importer(
    __name__,
    {
        "ConversionReport": "to_hf",
        "ImportReport": "from_hf",
        "write_checkpoint": "from_hf",
        "write_hf_folder": "to_hf",
    },
)
