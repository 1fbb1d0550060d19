"""The kernels of csrc/cuda: launched by CuPy for tensors on CUDA; for tensors on the CPU their code runs on the CPU.

The functions here compute launch shapes and arguments, and allocate results, in the same way for both.
"""
