"""Bringing dropped values back: a block's code runs again onto a tape, computed as far as it is asked for."""
