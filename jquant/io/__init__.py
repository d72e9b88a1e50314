"""Reading and writing files: model checkpoints, tokenizers, downloads."""
