"""Paged, quantized attention: Triton kernels, and the torch twins that define them."""
