"""A program as C source and kernels in object code: no runtime, no operating system, no allocation."""
