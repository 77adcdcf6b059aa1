"""Hugging Face checkpoints: reading their files safely, and writing NVFP4 ones."""
