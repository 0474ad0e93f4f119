"""Kernels of the compiled extension `mra_kernels._C`: C++ with OpenMP on a CPU, CUDA C++ on a GPU."""
