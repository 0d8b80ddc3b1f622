"""Proofs about the Triton kernels that need no GPU; `python tests/verify` lists the checks.

Triton's interpreter runs a kernel program by program in NumPy. It shows the maths, the masks, the addresses, and which
program touches which element. Triton's compiler shows, ahead of time, the resources of a GPU that a kernel needs.

Not proved here: the memory model, the rounding of the hardware, speed, and races inside a program. Only the races of a
gradient that overwrites its input are checked.
"""
