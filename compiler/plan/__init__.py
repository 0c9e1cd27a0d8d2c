"""Which parts of a model become integers, which tensors share a scale, and the record of every decision."""
