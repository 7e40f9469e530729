"""The version, in one place: metadata, plans and checkpoints read it from here."""

__version__ = "0.1.0.dev0"
