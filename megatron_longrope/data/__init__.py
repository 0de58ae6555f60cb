"""Text to tokens to fixed-length BOS/EOS segments (or whole documents) in Megatron's .bin/.idx."""
