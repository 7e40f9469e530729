"""Native kernels for the CPU: C++ printed from the rules and codecs, compiled on first use."""
