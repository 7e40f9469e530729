"""memopt.planner"""
