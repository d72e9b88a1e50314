"""Timed comparisons, not tests. Each prints a table and, last, one JSON line of its figures."""
