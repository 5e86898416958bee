"""What production reads: the chosen point as a folder of files that need nightpress no more."""

from .bundle import export_trial

__all__ = ["export_trial"]
