"""memopt.offload"""
