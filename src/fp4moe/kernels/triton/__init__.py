"""Our Triton kernels for Ampere, Ada and Hopper."""
