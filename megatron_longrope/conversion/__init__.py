"""Megatron checkpoint <-> Hugging Face folder."""
