"""The command line: parse, call, print. No decision about the domain is made here."""

from .main import main

__all__ = ["main"]
