"""Three ways to start the rewrite: torch.compile's backend, Inductor's pass, Torch-TensorRT's."""
