"""The host tier on CUDA: pinned buffers, and copies beside compute."""
