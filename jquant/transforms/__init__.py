"""Exact rewrites of the network before rounding."""

from jquant.transforms.awq import AWQ

__all__ = ["AWQ"]
