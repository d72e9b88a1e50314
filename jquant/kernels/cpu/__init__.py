"""Products on a CPU in C++, called by XLA."""
