"""Megatron checkpoints to Hugging Face folders and back; what is written is compared first."""

from megatron_longrope.conversion.from_hf import ImportReport, convert_from_hf
from megatron_longrope.conversion.to_hf import ConversionReport, convert_to_hf

__all__ = ["ConversionReport", "ImportReport", "convert_from_hf", "convert_to_hf"]
