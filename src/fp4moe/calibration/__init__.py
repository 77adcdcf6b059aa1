"""Ranges of activations, recorded while a model runs."""
