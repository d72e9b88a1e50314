"""jquant."""
