"""memopt.presets"""
