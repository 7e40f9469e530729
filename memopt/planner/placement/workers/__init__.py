"""Scripts that run in a process of their own because their solver's library clashes with others."""
