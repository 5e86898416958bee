"""What production reads: the chosen point as a folder of files that need nightpress no more."""

from .bundle import Options, export_trial
from .finetune import finetune_export
from .fronts import export_set

__all__ = ["Options", "export_set", "export_trial", "finetune_export"]
