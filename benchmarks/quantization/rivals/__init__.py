"""One module per tool; each has ``quantize(job)``, runs in its own process and writes ``job.output``."""
