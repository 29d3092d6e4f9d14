"""`gemmule report RUN ...`: one HTML file that shows what a run is, did and cost, or a page that follows it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmule.cli.screen import Screen, logged_to

if TYPE_CHECKING:
    from gemmule.report.summary import RunFacts

_HEAD = 4096  # bytes of a file in which one of our pages says what it is


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, laid over each other.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="The file to write; an earlier report there is replaced, nothing else is.  "
            "[default: report.html, of one run in its folder]",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page while the runs train, until Ctrl-C; write no file.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of --watch; 0 takes a free one.  [default: 8765]")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address of --watch; any other lets others read the runs.  [default: 127.0.0.1]"),
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card/--no-card",
            help="Write README.md, a Hub model card, into the model folder; one that you wrote or changed stays.",
        ),
    ] = True,
    send: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Instead, send to wandb, mlflow or trackio what it has not got of the runs."),
    ] = None,
) -> None:
    """Show runs in one HTML file that asks no host for anything: to keep, to mail, to print.

    It holds a verdict, the curves, samples through time, the architecture, the data, evaluations, the plan beside what
    was measured, and the recipe; of a run that is unfinished or damaged, what there is. Beside it, loss.png, loss.svg
    and the model card are written into each run folder.

    Examples:

        gemmule report runs/story

        gemmule report runs/story runs/tinystories-cpu --out compared.html

        gemmule report runs/story --watch

        gemmule report runs/story --send wandb
    """
    from gemmule.errors import UserError
    from gemmule.reading import local_path

    runs = [local_path(run) for run in runs]
    if watch and out is not None:
        raise UserError("--out: --watch writes no file; leave out one of them")
    if not watch and (port is not None or host is not None):
        raise UserError("--port, --host: are for --watch; add it, or leave them out")
    if send is not None:
        _send(runs, send, watch or out is not None)
        return
    if watch:
        _serve(runs, host, 8765 if port is None else port)
        return
    from gemmule.files import atomic_write
    from gemmule.report.page import report_page
    from gemmule.report.summary import read_runs

    out = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    with Screen() as screen, logged_to(screen):
        facts = read_runs(runs)
        _check_target(out)
        page = report_page(facts)
        with atomic_write(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
        screen.print(f"wrote {out}: {len(page.encode()) / 1e3:,.0f} kB")
        for each in facts:
            _write_beside(screen, each, card)


def _send(runs: list[Path], service: str, shown: bool) -> None:
    from gemmule.errors import UserError
    from gemmule.run_folder import RunFolder
    from gemmule.tracking.process import send

    if shown:
        raise UserError("--send: writes and serves no page; leave out --out and --watch")
    with Screen() as screen, logged_to(screen):
        for run in runs:
            typer.echo(send(RunFolder(run), service))


def _serve(runs: list[Path], host: str | None, port: int) -> None:
    from gemmule.report.watch import LOOPBACK, WatchServer

    with Screen() as screen, logged_to(screen), WatchServer(runs, host or LOOPBACK, port) as server:
        screen.print(f"{server.address} shows {', '.join(map(str, runs))}; stop with Ctrl-C")
        if host not in (None, LOOPBACK, "localhost"):
            screen.print(f"note: whoever reaches {host} can read these runs, their samples and recipes")
        server.serve_forever(poll_interval=0.2)


def _check_target(out: Path) -> None:
    """Raise OutputError where a file that is no report of ours is to be replaced."""
    from gemmule.errors import OutputError
    from gemmule.reading import path_kind
    from gemmule.report.html import GENERATOR

    kind = path_kind(out, OutputError)
    if kind is None:
        return
    mark = f'<meta name="generator" content="{GENERATOR}">'
    try:
        ours = kind == "file" and mark.encode() in _beginning(out)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be read: {error.strerror}") from None
    if not ours:
        what = "a folder" if kind == "folder" else "there already, and no report"
        raise OutputError(f"--out {out}: is {what}; name a new file, such as {out.with_suffix('.report.html').name}")


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_HEAD)


def _write_beside(screen: Screen, facts: "RunFacts", card: bool) -> None:
    """Write curves and the model card of a run into its folder; what fails there costs a note."""
    from gemmule.errors import UserError
    from gemmule.formats.model_card import CARD, write_hub_card
    from gemmule.report.card import model_card
    from gemmule.report.curves import draw_curves_of

    run = facts.run
    try:
        if facts.logs.metrics.curves.get("loss"):
            draw_curves_of(facts.logs.metrics, run, facts.name)
            screen.print(f"wrote {run.curves} and {run.curves_svg}")
        if card and (run.model / "config.json").is_file():
            written = write_hub_card(model_card(facts), run.model)
            screen.print(f"{'wrote' if written else 'kept, since it is not ours:'} {run.model / CARD}")
    except (UserError, OSError) as error:
        screen.print(f"note: {error}")
