"""The command line: ``memopt plan | place | probe | bench``; every command is a file here.

Exit status: 0 done, 1 bad input (one line on stderr, no traceback), 2 nothing fits, 130 interrupted.
"""

from memopt.cli.running import app, main

__all__ = ["app", "main"]
