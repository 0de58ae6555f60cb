"""Read a Hugging Face folder as a checkpoint: families, their tensors, what is supported."""
