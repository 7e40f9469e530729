"""memopt.optim"""
