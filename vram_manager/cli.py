"""The verbs. All but run, demo, doctor and simulate speak to the daemon's socket; imports are lazy, so they are quick.

Exit status: 0 done, 1 something is wrong, 2 wrong usage or setting, 3 refused, 4 the daemon cannot be reached.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import click

from vram_manager import __version__
from vram_manager.errors import AlreadyRunning, SettingsError, Unreachable

EXIT_WRONG, EXIT_USAGE, EXIT_REFUSED, EXIT_UNREACHABLE = 1, 2, 3, 4
_json_option = click.option("--json", "as_json", is_flag=True, help="For machines: one JSON document.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Arbitrates the GPU between Ollama and ComfyUI. Settings come from the environment; see the README."""


def main() -> None:
    """Runs the verb; every expected failure is one line on stderr and an exit status."""
    try:
        cli(prog_name="vram-manager")
    except SettingsError as error:
        _fail(EXIT_USAGE, str(error))
    except AlreadyRunning as error:
        _fail(EXIT_WRONG, str(error))
    except Unreachable as error:
        _fail(EXIT_UNREACHABLE, str(error))


def _fail(status: int, words: str) -> NoReturn:
    click.echo(f"vram-manager: {words}", err=True)
    sys.exit(status)


def _get(path: str) -> Any:
    from vram_manager.client import call

    reply = call("GET", path)
    if reply.error is not None:
        _fail(EXIT_WRONG, reply.error)
    return reply.body


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2))


@cli.command()
def run() -> None:
    """The daemon: watch, decide, free, prove; until SIGTERM."""
    from vram_manager import config, daemon

    sys.exit(daemon.run(config.load()))


@cli.command()
@click.option("--fast", is_flag=True, help="Shorter pauses between the scenes.")
def demo(fast: bool) -> None:
    """A story on a simulated GPU with the real daemon: see it free memory, in under 40 seconds."""
    from vram_manager.demo import play

    sys.exit(play(fast=fast))


@cli.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Checks every part for real, from here, and says how to mend what is wrong."""
    from vram_manager import config
    from vram_manager.doctor import examine, in_words

    findings = examine(config.load())
    if as_json:
        _print_json([finding.as_json() for finding in findings])
    else:
        click.echo(in_words(findings, colour=sys.stdout.isatty()))
    sys.exit(EXIT_WRONG if any(finding.verdict == "wrong" for finding in findings) else 0)


@cli.command()
@click.option("--node", "urls", multiple=True, metavar="URL", help="Ask this further Ollama, from here. Repeatable.")
@click.option(
    "--measure",
    is_flag=True,
    help="Measure the speed of these nodes, or of the daemon's that tell nothing because nothing is loaded there.",
)
@_json_option
def report(urls: tuple[str, ...], measure: bool, as_json: bool) -> None:
    """Who holds the GPU memory now, and where further Ollama servers run their models.

    Without a daemon only the nodes given with --node are shown: exit 0, or 4 when none of them answers.
    """
    from vram_manager.report import text
    from vram_manager.report.terminal import Terminal
    from vram_manager.summary import NO_SNAPSHOT, document

    snapshot, listed, problem = NO_SNAPSHOT, [], None
    try:
        snapshot, listed = _get("/v1/snapshot"), _get("/v1/events?limit=8")["events"]
    except Unreachable as error:
        if not urls:
            raise
        problem = str(error)
        click.echo(f"vram-manager: {problem}; only the nodes are shown", err=True)
    nodes = _nodes(urls, snapshot.get("nodes", []), measure=measure) if urls or measure else []
    whole = document(snapshot, listed, nodes, problem=problem)
    if as_json:
        _print_json(whole)
    else:
        click.echo(text(whole, Terminal.of(sys.stdout)))
    if problem and all(node["state"] != "ok" for node in nodes):
        sys.exit(EXIT_UNREACHABLE)


def _nodes(urls: tuple[str, ...], known: list[dict[str, Any]], *, measure: bool) -> list[dict[str, Any]]:
    from vram_manager.nodes import checked, look

    try:
        urls = tuple(map(checked, urls))
    except ValueError as error:
        raise click.UsageError(f"--node: {error}") from error
    return look(urls, known, measure=measure)


@cli.command()
@click.option("--once", is_flag=True, help="One picture and no more; so it is where the output is no terminal.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.25, 60),
    default=1.0,
    show_default=True,
    metavar="N",
    help="How often to look; + and - change it.",
)
@click.option("--ascii", "ascii_only", is_flag=True, help="No other characters than ASCII.")
def top(**options: Any) -> None:
    """The GPUs live: who has the memory, who waits, what happened and why. ? shows the keys."""
    from vram_manager.top import run

    run(**options)


@cli.command()
@click.option("--follow", "-f", is_flag=True, help="Go on as they happen.")
@click.option("--after", default="", metavar="ID", help="Only events after this one.")
@click.option("--limit", default=50, show_default=True)
@_json_option
def events(follow: bool, after: str, limit: int, as_json: bool) -> None:
    """What happened."""
    from vram_manager import client
    from vram_manager.words import event_line

    query = f"?limit={limit}" + (f"&after={quote(after)}" if after else "")
    listed = _get(f"/v1/events{query}")["events"]
    if as_json and not follow:
        _print_json(listed)
        return
    for event in listed:
        click.echo(json.dumps(event) if as_json else event_line(event))
    if follow:
        last = listed[-1]["id"] if listed else after
        try:
            for event in client.follow(f"/v1/events?after={quote(last)}"):
                click.echo(json.dumps(event) if as_json else event_line(event))
        except KeyboardInterrupt:
            pass


@cli.command()
@click.option("--from", "begin", default="-1h", show_default=True, metavar="TIME", help="RFC 3339, or -30m, -2h, -7d.")
@click.option("--to", "end", default="now", show_default=True, metavar="TIME")
@click.option("--step", type=click.IntRange(1), metavar="SECONDS", help="Else about 600 steps.")
@click.option("--gpu", metavar="GPU", help="Index or UUID; else all.")
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="To this file.")
@_json_option
def history(begin: str, end: str, step: int | None, gpu: str | None, out: Path | None, as_json: bool) -> None:
    """Who had how much GPU memory over time, as CSV."""
    from urllib.parse import urlencode

    from vram_manager.client import call

    asked = {"from": begin, "to": end, "step": step, "gpu": gpu, "format": "json" if as_json else "csv"}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    reply = call("GET", f"/v1/history?{query}")
    if reply.status != 200:
        _fail(EXIT_WRONG, reply.words or f"HTTP {reply.status}")
    # One line: a page of numbers, each on a line of its own, is of use to nobody.
    text = f"{json.dumps(reply.body)}\n" if as_json else reply.body
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        _fail(EXIT_WRONG, f"--out {out}: {error.strerror}")


@cli.command()
@click.argument("event_or_decision", required=False, metavar="[ID]")
@_json_option
def why(event_or_decision: str | None, as_json: bool) -> None:
    """Why something was done or not: the newest decisions, or the one behind an event or decision ID."""
    from vram_manager.words import decision_in_words, event_line

    decisions = _get("/v1/decisions?limit=500")["decisions"]
    if event_or_decision is None:
        shown = decisions[:8]
        if as_json:
            _print_json(shown)
        elif not shown:
            click.echo("Nothing has been decided yet.")
        for decision in () if as_json else reversed(shown):
            click.echo(decision_in_words(decision, inputs=False))
        return
    listed = _get("/v1/events?limit=1000")["events"]
    related = _related(event_or_decision, listed)
    wanted = {event["decision_id"] for event in related} | {event_or_decision}
    found = [decision for decision in decisions if decision["id"] in wanted]
    if not related and not found:
        _fail(EXIT_WRONG, f"{event_or_decision}: no such event or decision is remembered")
    if as_json:
        _print_json({"events": related, "decisions": found})
        return
    for event in related:
        click.echo(event_line(event))
    for decision in reversed(found):
        click.echo(decision_in_words(decision, inputs=True))
    # What is said to a worker has its whole reason in its own words.
    if not found and any(not (event["target"] or "").startswith("worker:") for event in related):
        click.echo("The decision behind it was made before the daemon's last start; only the event is remembered.")


def _related(wanted: str, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The event, the free it belongs to, and whatever else belongs to that free."""
    first = [event for event in listed if event["id"] == wanted]
    actions = {event["action_id"] or event["id"] for event in first}
    return [event for event in listed if event["id"] in actions or event["action_id"] in actions or event in first]


@cli.command()
@click.option("--stage", type=click.Choice(["soft", "unload"]), default="soft", show_default=True)
@click.option("--force", is_flag=True, help="Also while ComfyUI is busy, cooling down or holds little.")
@click.option("--ollama", "model", metavar="MODEL", help="Unload this Ollama model instead of freeing ComfyUI.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the proof.")
@_json_option
def free(stage: str, force: bool, model: str | None, wait: bool, as_json: bool) -> None:
    """Free by hand, bound by the same rules: exit 0 asked (and proven), 1 not proven, 3 refused."""
    from vram_manager import client
    from vram_manager.words import event_line

    wish: dict[str, object] = {"force": force}
    wish |= {"target": "ollama", "model": model} if model else {"stage": stage}
    reply = client.call("POST", "/v1/free", wish)
    if reply.error is not None and reply.status != 409:
        _fail(EXIT_WRONG, reply.error)
    if reply.error is not None:
        if as_json:
            _print_json(reply.body)
        else:
            click.echo(f"Refused: {reply.error}", err=True)
        sys.exit(EXIT_REFUSED)
    asked = reply.body["event_id"]
    if not wait:
        click.echo(json.dumps(reply.body) if as_json else f"Asked [{asked}]")
        return
    for event in client.follow(f"/v1/events?after={asked}"):
        if event["action_id"] == asked and event["type"] in ("freed", "free_unconfirmed"):
            click.echo(json.dumps(event) if as_json else event_line(event))
            sys.exit(0 if event["type"] == "freed" else EXIT_WRONG)
    _fail(EXIT_UNREACHABLE, "the daemon went away before the proof")


def _asking(function: Any) -> Any:
    """The options of `check` and `exec`: what is needed, where, and how urgently."""
    for option in reversed(
        (
            click.option("--model", metavar="NAME", help="Estimate for this model instead of a size."),
            click.option("--context", type=click.IntRange(1), metavar="TOKENS", help="Context of an Ollama model."),
            click.option("--workflow", type=click.File("rb"), metavar="FILE", help="Estimate for a ComfyUI prompt."),
            click.option("--gpu", metavar="GPU", help="Index or UUID; else the one with most room."),
            click.option("--margin-mb", type=click.IntRange(0), metavar="MIB", help="Instead of the safety margin."),
            click.option("--priority", type=click.Choice(["interactive", "normal", "batch"])),
            click.option("--strict", is_flag=True, help="Exit 4 when no daemon answers, instead of going on."),
        )
    ):
        function = option(function)
    return function


def _wish(required: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What `check` and `lease` of the client take."""
    if options["workflow"] is not None:
        try:
            options["workflow"] = json.load(options["workflow"])
        except ValueError as error:
            raise click.UsageError(f"--workflow: not JSON: {error}") from error
    if sum(given is not None for given in (required, options["model"], options["workflow"])) == 0:
        raise click.UsageError("say how much: a size such as 24GiB, --model NAME or --workflow FILE")
    return {"required": required, **options}


def _client(strict: bool, owner: str) -> Any:
    """A client that goes on without a daemon unless that is forbidden, and says so in one line."""
    import warnings

    from vram_manager.client import VramClient

    warnings.showwarning = lambda message, *_, **__: click.echo(f"vram-manager: warning: {message}", err=True)
    warnings.simplefilter("always")
    return VramClient(owner=owner, fail_open=False if strict else None)


@cli.command()
@click.argument("required", required=False, metavar="[SIZE]")
@_asking
@_json_option
def check(required: str | None, as_json: bool, strict: bool, **options: Any) -> None:
    """Is there room for SIZE (24GiB, 11.5GB, 90%) now? Nothing is reserved.

    Exit 0 admitted, 3 refused. No daemon: exit 0 with a warning, or 4 with --strict.
    """
    from dataclasses import asdict

    from vram_manager.errors import InvalidRequest

    try:
        admission = _client(strict, f"cli-{os.getpid()}").check(**_wish(required, options))
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        _print_json(asdict(admission))
    else:
        click.echo(f"{'Admitted' if admission.admitted else 'Refused'}: {admission.reason}")
        for alternative in admission.alternatives:
            click.echo(f"  would fit now: {alternative.words}")
    sys.exit(0 if admission.admitted else EXIT_REFUSED)


@cli.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--need", metavar="SIZE", help="What CMD will take, such as 24GiB or 90%.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(0), metavar="SECONDS", help="How long to wait in line.")
@click.option("--owner", metavar="NAME", help="Who asks; else the name of CMD.")
@_asking
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def execute(
    need: str | None,
    wait_seconds: float | None,
    owner: str | None,
    strict: bool,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Runs CMD with its memory promised for as long as it lives, and ends with its exit status.

    Exit 3 refused, 4 no daemon and --strict; 126 and 127 CMD cannot be run; 128 + N ended by signal N.
    """
    from vram_manager.errors import InsufficientVram, InvalidRequest

    client = _client(strict, owner or f"{Path(command[0]).name}-{os.getpid()}")
    try:
        lease = client.lease(wait_seconds=wait_seconds, **_wish(need, options)).acquire()
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    except InsufficientVram as error:
        _fail(EXIT_REFUSED, f"Refused: {error}")
    with lease:
        sys.exit(_run(command, lease))


def _run(command: tuple[str, ...], lease: Any) -> int:
    """The exit status of the command, whom the signals that reach this process are passed on to."""
    from vram_manager import child

    # The command has the connection too: should this process be killed, the lease still lives as long as it.
    hold = () if lease.hold_fd is None else (lease.hold_fd,)
    try:
        return child.run(command, pass_fds=hold, started=lambda pid: lease.renew(pid=pid))
    except child.CannotRun as error:
        click.echo(f"vram-manager: {error}", err=True)
        return error.status


def _file(words: str) -> Any:
    return {"type": click.Path(dir_okay=False, path_type=Path), "metavar": "FILE", "help": words}


@cli.command("record", context_settings={"allow_interspersed_args": False})
@click.option("--out", "timeline", **_file("The whole course, as CSV, written as it goes. Without it none is written."))
@click.option("--plot", "picture", **_file("A picture: .png, .svg or .pdf (needs vram-manager[plot])."))
@click.option("--summary", **_file("The statistics as one JSON document."))
@click.option(
    "--interval",
    "interval_seconds",
    type=click.FloatRange(0.005, 3600),
    default=0.05,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks: a peak that lasts longer is surely seen.",
)
@click.option("--gpu", metavar="GPU", help="Index or UUID; else all.")
@click.option("--json", "as_json", is_flag=True, help="The statistics as the last line of stderr, as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def record_command(command: tuple[str, ...], **options: Any) -> None:
    """Runs CMD, records the GPU memory that is taken meanwhile, and ends with its exit status.

    The statistics are told on stderr; stdin and stdout are CMD's alone. Exit 2: a wrong option, and CMD was not run;
    126 and 127 CMD cannot be run; 128 + N ended by signal N. A GPU that cannot be read is a warning.
    """
    from vram_manager import config
    from vram_manager.gpus.all import AllGpus
    from vram_manager.record import run, sources

    settings = config.load()
    deadline = settings.gpu.vram_check_timeout_seconds
    # Held awake: the command is about to use it.
    asked: list[sources.Source] = [sources.Drivers(lambda: AllGpus(deadline_seconds=deadline, gpu_sleep=False))]
    if settings.comfyui.comfyui_url:
        asked.append(sources.ComfyUI(settings.comfyui.comfyui_url, settings.comfyui.comfyui_headers))
    sys.exit(run.record(command, run.Wish(**options), [*asked, sources.Daemon()]))


@cli.command()
@click.option("--release", "ended", metavar="ID", help="End this lease instead of listing them.")
@_json_option
def leases(ended: str | None, as_json: bool) -> None:
    """Who was promised how much, and who waits in line."""
    from vram_manager.client import call
    from vram_manager.words import leases_in_words

    if ended is not None:
        reply = call("DELETE", f"/v1/leases/{quote(ended, safe='')}")
        if reply.status != 204:
            _fail(EXIT_WRONG, reply.error or f"{ended!r} is the id of no lease")
        click.echo(f"Released {ended}")
        return
    listed = _get("/v1/leases")
    if as_json:
        _print_json(listed)
    else:
        click.echo(leases_in_words(listed))


@cli.command()
def health() -> None:
    """For a container's health check: exit 0 when the daemon's cycle is alive."""
    from vram_manager.client import call

    reply = call("GET", "/health", timeout_seconds=5.0)
    click.echo(reply.body["status"])
    sys.exit(0 if reply.status == 200 else EXIT_WRONG)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--ollama-port", default=11434, show_default=True)
@click.option("--comfyui-port", default=8188, show_default=True)
@click.option("--control-port", type=int, help="Also a port to look at and fill the simulated GPU.")
@click.option("--gpu-gib", default=24.0, show_default=True)
@click.option("--mode", type=click.Choice(["legacy", "dynamic", "highvram"]), default="dynamic", show_default=True)
@click.option(
    "--nvml-state",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Mirror the GPUs into a fake NVML's state file.",
)
@click.option("--gpus", type=click.IntRange(1, 8), default=1, show_default=True, help="Cards, for the fake NVML.")
@click.option("--nodes", type=click.IntRange(0, 32), default=0, help="Further Ollama servers, on the next ports.")
@click.option("--busy", is_flag=True, help="With people who chat, render and train.")
@click.option("--seed", default=1, show_default=True, help="What they do is drawn from it.")
@click.option("--through-ollama", metavar="URL", help="They chat through this gateway.")
@click.option("--through-comfyui", metavar="URL", help="They render through this gateway.")
@click.option("--socket", metavar="PATH", help="A worker of theirs asks the daemon that listens there.")
def simulate(
    busy: bool,
    seed: int,
    gpus: int,
    nodes: int,
    through_ollama: str | None,
    through_comfyui: str | None,
    socket: str | None,
    **options: Any,
) -> None:
    """An Ollama and a ComfyUI on one simulated GPU, on real ports, quirks included."""
    import asyncio
    import signal

    from vram_manager.simulator.serve import Extras, serve_world

    extras = Extras(
        busy=busy,
        seed=seed,
        gpus=gpus,
        nodes=nodes,
        through_ollama=through_ollama,
        through_comfyui=through_comfyui,
        socket=socket,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve_world(extras=extras, **options))


@cli.command()
def version() -> None:
    """The version."""
    click.echo(__version__)
