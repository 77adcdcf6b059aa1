"""The kernels of the package humming-kernels."""
