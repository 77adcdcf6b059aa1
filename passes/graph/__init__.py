"""Reading and running torch.fx graphs."""
