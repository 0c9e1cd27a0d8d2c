"""Folders of the Hugging Face form, read without that library: configuration, checkpoints, the graph they describe."""
