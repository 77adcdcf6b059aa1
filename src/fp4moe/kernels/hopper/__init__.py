"""Our own GEMMs for Hopper, in CUDA C++ that is compiled at run time."""
