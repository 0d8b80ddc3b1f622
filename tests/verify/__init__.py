"""Proofs about the Triton kernels that need no GPU; `python tests/verify` lists the checks.

Triton's interpreter runs a kernel program by program in NumPy. It shows the maths, the masks, the addresses, and which
program touches which element. Triton's compiler shows, ahead of time, what a kernel needs of a GPU.

Not proved here: races inside a program (except those of a gradient that overwrites its input), the memory model, the
rounding of the hardware, and speed.
"""
