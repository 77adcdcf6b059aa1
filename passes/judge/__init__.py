"""What a region of a graph computes: decided by numbers."""
