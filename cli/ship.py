"""Commands from a chosen point to production: export it, check it where it will run, train it to full length."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Force, Json, RunDir
from .output import emit, log_to_stderr, say
from .points import find_trial

ExportDir = Annotated[Path, typer.Option("--out", metavar="DIR", help="The export's folder.")]
Exported = Annotated[Path, typer.Argument(metavar="DIR", help="An export's folder.")]
OpenVino = Annotated[bool, typer.Option("--openvino", help="Add OpenVINO's files (where openvino is installed).")]
Opset = Annotated[int | None, typer.Option("--opset", help="Version of ONNX's operators; default: as measured.")]
IrVersion = Annotated[int | None, typer.Option("--ir-version", help="Version of the file format.")]


def export(
    folder: RunDir,
    out: ExportDir,
    trial: Annotated[
        str | None, typer.Argument(metavar="[TRIAL|best|knee]", help="Which point; default: best.")
    ] = None,
    set_: Annotated[
        int | None, typer.Option("--set", min=2, max=20, metavar="N", help="So many points of the front instead.")
    ] = None,
    require_approval: Annotated[
        bool, typer.Option("--require-approval", help="Refuse what nobody approved, or what was rejected last.")
    ] = False,
    run_task: Annotated[
        bool,
        typer.Option("--run-task", help="Trust the task of a run from elsewhere, which is executed."),
    ] = False,
    opset: Opset = None,
    ir_version: IrVersion = None,
    openvino: OpenVino = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """A point's production files. Example: nightpress export runs/plates best --out export"""
    from ..export import Options, export_set, export_trial
    from ..reports import front
    from ..search.folder import read_run
    from ..spaces.errors import InputError

    if set_ is not None and trial is not None:
        raise InputError(f"--set takes points of the front by itself, so TRIAL {trial!r} cannot stand beside it.")
    log_to_stderr()
    record = read_run(folder)
    options = Options(
        force=force,
        opset=opset,
        ir_version=ir_version,
        openvino=openvino,
        require_approval=require_approval,
        run_task=run_task,
    )
    if set_ is not None:
        data = export_set(record, front(record), set_, out, options)
    else:
        data = export_trial(record, find_trial(record, trial or "best"), out, options)
    if json:
        emit(data)
        return
    say(f"wrote {out}: {', '.join(data['files'])}")
    for entry in data["models"] if set_ is not None else [data]:
        say(_figures(entry))


def verify(
    folder: Exported,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="test.npz (inputs, targets) or a folder of classes.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0, max=1, help="Of the accuracy: 0.001 is 0.1 point.")
    ] = None,
    mean: Annotated[str, typer.Option("--mean", help="Of images, one value or one a channel: 0.485,0.456,0.406")] = "0",
    std: Annotated[str, typer.Option("--std", help="The same.")] = "1",
    expect: Annotated[
        str | None, typer.Option("--expect", metavar="SHA256", help="The manifest's, as export printed it.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Whether to measure.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="What cannot be checked counts as failed.")] = False,
    json: Json = False,
) -> int:
    """Check an export on this machine; exit code 1 when it does not hold.
    Example: nightpress verify export --data test.npz"""
    from ..export import verify as check
    from ..export.bundle import timer_script
    from ..spaces.errors import InputError

    try:
        options = check.Options(
            data=data, expect=expect, tolerance=tolerance, mean=check.numbers(mean), std=check.numbers(std),
            latency=latency,
        )  # fmt: skip
        checks = check.verify(folder, options, timer_script())
    except check.VerifyError as error:
        raise InputError(str(error)) from None
    answer = check.to_dict(folder, checks, strict=strict)
    if json:
        emit(answer)
    else:
        for line in check.lines(checks):
            say(line)
    return 0 if answer["holds"] else 1


def finetune(
    folder: Exported,
    out: Annotated[Path, typer.Option("--out", metavar="NEW", help="The new export's folder.")],
    epochs: Annotated[
        float | None, typer.Option("--epochs", min=0, help="Wins over finetune.yaml; 0 only measures again.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Where the task is on this machine.")
    ] = None,
    openvino: OpenVino = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train an export to full length, as its finetune.yaml says, into a new export.
    Example: nightpress finetune export --out better --epochs 30"""
    from ..export import Options, finetune_export

    log_to_stderr()
    options = Options(force=force, openvino=openvino)
    data = finetune_export(folder, out, epochs=epochs, task=task, options=options)
    if json:
        emit(data)
        return
    say(f"wrote {out} after {data['epochs']:g} epochs: accuracy was {data['before']:.4f}")
    say(_figures(data))


def _figures(data: dict[str, Any]) -> str:
    doubts = [] if data["latency_measured"] else ["predicted, not measured"]
    doubts += [f"--force: {data['forced']}"] if data["forced"] else []
    told = f" ({'; '.join(doubts)})" if doubts else ""
    return (
        f"accuracy {data['accuracy']:.4f}, {data['latency_ms']:.3f} ms{told} "
        f"against {data['reference_ms']:.3f} ms ({data['ratio']:.2f}× faster), {data['size_bytes'] / 1000:.0f} kB"
        + (f", agreement with torch {data['parity']['top1_agreement']:.2%}" if "parity" in data else "")
    )
