"""GGUF files: block formats of weights, how they are rounded, reading and writing. Knows numbers, not models."""
