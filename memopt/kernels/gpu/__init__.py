"""Triton kernels for CUDA, ROCm and XPU, printed from the rules and codecs; imported only where one runs."""
