"""What an MoE block in a tree of modules is, and how it is replaced."""
