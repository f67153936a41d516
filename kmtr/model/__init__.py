"""Tokenizers, transformer, encoders and decoders. Nothing here knows that Ray or DeepSpeed exist."""
