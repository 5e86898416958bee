"""The commands. Each parses, calls one function of the layers below, and prints."""

import typer

from . import dashboard, kit, night, parts, review, ship, suggest

app = typer.Typer(
    name="nightpress",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    parts.init, parts.doctor, parts.inspect, parts.sample, parts.calibrate, kit.kit, parts.predict, parts.measure,
    night.run, night.status, dashboard.dashboard, night.report, night.compare, suggest.suggest,
    review.review, review.approve, review.reject, ship.export, ship.verify, ship.finetune, parts.apply,
):  # fmt: skip
    app.command()(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Leave a trained model, a device and a deadline in the evening; review a measured Pareto front in the morning."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"nightpress {installed('nightpress')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
