"""memopt.kernels"""
