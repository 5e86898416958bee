"""Which packages wrote an export and which it needs, with their licences, from their own metadata."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata

NEEDED = ("numpy", "onnxruntime")
WROTE = ("nightpress", "onnx", "safetensors", "torch")
_HEAD = """Licences of the packages behind this export, as their own metadata states them. The model's weights and the
data that they were trained on are under the licences of their owners; nightpress adds none.
"""


def licences_text(also_wrote: Sequence[str] = ()) -> str:
    """The text of ``LICENSES.txt``."""
    needed = [f"  {licence_line(name)}" for name in NEEDED]
    wrote = [f"  {licence_line(name)}" for name in sorted({*WROTE, *also_wrote})]
    return "\n".join([_HEAD, "Needed to run it:", *needed, "", "Used to make it:", *wrote, ""])


def licence_line(package: str) -> str:
    """``name version: licence`` of an installed package."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return f"{package}: not installed"
    classifiers = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    stated = (found["License"] or "").strip().splitlines()  # older packages put the whole text there
    licence = found["License-Expression"] or "; ".join(classifiers) or (stated[0] if stated else "not stated")
    return f"{package} {found['Version']}: {licence}"
