"""memopt.report"""
