"""Code that the ops share: checks, registration of ops, memory, and the tiles of Triton kernels."""
