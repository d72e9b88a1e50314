"""Products of inputs with packed weights."""
