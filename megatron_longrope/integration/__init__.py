"""The only package that touches Megatron's own symbols."""
