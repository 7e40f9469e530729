"""memopt.integrations"""
