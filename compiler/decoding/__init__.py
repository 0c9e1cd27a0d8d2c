"""What decoders take and give, seen from outside: token inputs, logits, caches; sampling and perplexity in numpy."""
