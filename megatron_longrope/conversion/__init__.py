"""Megatron checkpoints to Hugging Face folders, and the check that both compute the same."""

from megatron_longrope.conversion.to_hf import ConversionReport, convert_to_hf
from megatron_longrope.conversion.verify import VerificationReport, verify

__all__ = ["ConversionReport", "VerificationReport", "convert_to_hf", "verify"]
