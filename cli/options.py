"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

TaskRef = Annotated[
    str,
    typer.Argument(metavar="TASK", help="path/to/file.py:function, mnist5k-resnet, mnist5k-vgg or torchvision:<name>."),
]
TargetRef = Annotated[str, typer.Option("--target", metavar="T", help="onnxruntime, openvino, … or a profile file.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of the session; default: as the target says.")]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Inputs of one inference; default: as the target says.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PolicyFiles = Annotated[list[Path], typer.Argument(metavar="POLICY.json...", help="Policy files.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
ForceProfile = Annotated[bool, typer.Option("--force", help="Take a profile of another device or model all the same.")]
