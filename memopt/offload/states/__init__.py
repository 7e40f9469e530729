"""Optimizer states away from the device: on the host, paged, or in memory-mapped files."""
