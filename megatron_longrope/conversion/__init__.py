"""Megatron checkpoints to Hugging Face folders; `conversion.verify` checks that both agree."""

from megatron_longrope.conversion.to_hf import ConversionReport, convert_to_hf

__all__ = ["ConversionReport", "convert_to_hf"]
