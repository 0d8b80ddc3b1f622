"""What can be proved of a Triton kernel on a machine without a GPU.

Triton's interpreter runs a kernel program by program in NumPy: it checks maths, masks, addresses and who touches
what. The compiler, ahead of time, says what a kernel needs of the hardware. Neither runs on the hardware: races
inside a program but for those of an overwriting gradient, the memory model, the hardware's own rounding and every
figure of time are left unproved.

`python -m minirl_kernels.verify` lists the checks.
"""
