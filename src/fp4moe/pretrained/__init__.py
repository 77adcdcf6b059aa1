"""Checkpoints loaded into models of transformers."""
