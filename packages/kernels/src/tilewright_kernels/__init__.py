"""tilewright-kernels."""
