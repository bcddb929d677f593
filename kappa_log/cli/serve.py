"""kappa-log serve, token and init-events-api: the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kappa_log.cli import output
from kappa_log.cli.params import Commands, json_option, pass_app, stop_on_signal

if TYPE_CHECKING:
    from kappa_log.app import KappaLog
    from kappa_log.web.server import Server

WSGI = '''\
"""The events API for a WSGI server, with the settings of kappa_log.toml here.

Nothing is answered without a token: kappa-log token create NAME --role read|operate
"""

from kappa_log.web import create_app

app = create_app()
'''


host_option = click.option(
    "--host", help="Where to listen.  [default: api.host, 127.0.0.1]"
)
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="Which port; 0 takes a free one.  [default: api.port, 8080]",
)


@click.command()
@host_option
@port_option
@click.option("--access-log", is_flag=True, help="Write about each request on stderr.")
@pass_app
def serve(
    app: KappaLog, /, *, host: str | None, port: int | None, access_log: bool
) -> int:
    """Answer HTTP requests until Ctrl-C.

    On 127.0.0.1 without a token; anywhere else only with one.
    """
    server = listening(app, host, port)
    output.log_by(app.config.log)
    if access_log:
        from kappa_log.web import access

        access.register(server.app)
    with stop_on_signal() as stop:
        output.line(server.url)
        output.stdout().flush()
        output.say("Ctrl-C ends it. What there is: /openapi.json")
        server.run(stop)
    return stop.exit_code


def listening(app: KappaLog, host: str | None, port: int | None) -> Server:
    """Return a server that listens where flags or settings say.

    Raises:
        UsageError: Others could connect and there is no token, or the port is taken.
        SchemaOutOfDate: There is no database of this version to serve.
    """
    from kappa_log.web.server import Server

    app.head()
    settings = app.config.api
    return Server(
        app,
        settings.host if host is None else host,
        settings.port if port is None else port,
    )


@click.group(cls=Commands)
def token() -> None:
    """Say who may ask the API from other machines."""


@token.command("create")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["read", "operate"]),
    required=True,
    help="Whether it may also change things.",
)
@json_option
@pass_app
def create_token(app: KappaLog, /, *, name: str, role: str, as_json: bool) -> None:
    """Make a token called NAME and print it; it is shown this once."""
    secret = app.create_token(name, role)
    if as_json:
        facts = {"name": name, "role": role, "token": secret}
        output.print_json(output.to_json(facts))
        return
    output.line(secret)
    output.say("It is not kept and cannot be shown again. Send it as a header:")
    output.say("  Authorization: Bearer TOKEN")


@token.command("list")
@json_option
@pass_app
def list_tokens(app: KappaLog, /, *, as_json: bool) -> None:
    """List tokens: who may do what."""
    found = app.tokens()
    if as_json:
        for known in found:
            output.print_json(output.to_json(known))
        return
    if not found:
        output.say("There is no token: the API is for this machine alone.")
        output.next_steps("kappa-log token create NAME --role read")
        return
    output.print_table(
        ("name", "role", "created", "revoked"),
        [
            (
                known.name,
                known.role,
                output.when(known.created_at),
                known.revoked_at and output.when(known.revoked_at),
            )
            for known in found
        ],
    )


@token.command("revoke")
@click.argument("name")
@pass_app
def revoke_token(app: KappaLog, /, *, name: str) -> None:
    """Let the token NAME open nothing any more."""
    app.revoke_token(name)
    output.line(f"token {output.safe(name)} is revoked")


@click.command("init-events-api")
@click.argument(
    "folder",
    metavar="[DIR]",
    default=".",
    type=click.Path(file_okay=False, path_type=Path),
)
def init_events_api(*, folder: Path) -> None:
    """Write wsgi.py for other WSGI servers into DIR."""
    output.write_new(folder / "wsgi.py", WSGI.encode())
    output.next_steps(
        "kappa-log token create NAME --role operate",
        "gunicorn --workers 2 --threads 8 wsgi:app",
    )
