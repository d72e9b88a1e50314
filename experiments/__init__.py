"""One script an experiment: it reads configs/, appends to results/, prints a table."""
