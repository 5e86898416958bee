"""Entry point: exit codes and how errors are told. 0 done, 1 failed, 2 the input is wrong, 130 interrupted."""

import os
import sys
import traceback

from typer.exceptions import Abort, Exit, TyperException

from ..spaces.errors import InputError
from ..spaces.files import DISK_FULL


def main() -> int:
    """Run the command line; returns the exit code and never shows a traceback (NIGHTPRESS_DEBUG=1 does)."""
    # Threads that spin while they wait make training several times slower as soon as anything else uses a core.
    # Read when torch is loaded, here and in worker processes, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .app import app

    try:
        code = app(prog_name="nightpress", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Exit as end:
        return end.exit_code
    except (Abort, KeyboardInterrupt):
        return 130
    except TyperException as error:  # an unknown option, a missing argument
        return _fail(f"{error.format_message().rstrip('.')}; --help shows what there is.", 2)
    except InputError as error:
        return _fail(str(error), 2)
    except Exception as error:  # noqa: BLE001  whatever it was, the user gets a sentence
        if os.environ.get("NIGHTPRESS_DEBUG"):
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return _fail("The disk is full: make room; a run then goes on with --resume.", 2)
        text = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {text} (NIGHTPRESS_DEBUG=1 shows where)", 1)


def _fail(sentence: str, code: int) -> int:
    print(f"nightpress: {sentence}", file=sys.stderr)  # noqa: T201  the one place that tells errors
    return code
