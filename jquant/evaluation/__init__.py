"""What a model is worth: perplexity, divergence from a reference, generated text."""
