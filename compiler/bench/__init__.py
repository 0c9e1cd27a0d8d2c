"""``bench``: ways of running a model, each in a process of its own, timed in turns; and kernels under the roofline."""
