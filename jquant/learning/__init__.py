"""What is learned by gradients: ranges before rounding, scales and codes after it."""
