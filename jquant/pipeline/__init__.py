"""A decoder quantized block by block, in memory or from disk to disk."""
