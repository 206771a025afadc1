"""Weights that are mostly zeros, packed, and the kernels that multiply them: a shared library and its callers."""
