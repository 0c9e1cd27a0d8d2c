"""Which format every layer gets: measured losses, an exact optimum under budgets, and the loop that checks it."""
