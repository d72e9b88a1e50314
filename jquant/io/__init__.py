"""Reading files: model checkpoints, tokenizers, downloads."""
