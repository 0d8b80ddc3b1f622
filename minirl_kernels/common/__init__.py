"""The pieces below the ops: checks, registration, memory and the tiles that Triton kernels share."""
