"""What is learned by gradients: ranges before rounding; scales, zeros and weights after it; adapters."""
