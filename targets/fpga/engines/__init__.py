"""Layers of the dataflow family: their closed forms, parameters and memories, one kind of circuit a file."""
