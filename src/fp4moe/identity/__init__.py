"""Whose weights are these: packed weights of float ones, found by the storage's identity."""
