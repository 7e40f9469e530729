"""Static memory on CUDA: a step's allocations at planned offsets in one block."""
