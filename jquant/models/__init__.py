"""Decoders: their shapes, their forward pass, and what differs between families."""
