"""The root command: where to call, and what an error becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from nightschool.client import Client
from nightschool.errors import CALLER_MISTAKES, MessageTooLargeError, NightschoolError

SERVER_FAULT = 1
NOT_DONE = 1
USER_MISTAKE = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Target:
    """The global options: which server, as whom."""

    address: str | None
    token: str | None
    home: str | None
    tls: bool | None

    def client(self) -> Client:
        """A client of that server."""
        return Client(self.address, token=self.token, home=self.home, tls=self.tls)


class Commands(click.Group):
    """A group whose errors are one sentence on stderr and an exit code, never a traceback."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run, then exit: 0, or the code of what went wrong."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has left; Python must not complain about that at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(SERVER_FAULT)
        except click.Abort as error:
            if isinstance(error.__cause__, KeyboardInterrupt):
                _fail("interrupted", INTERRUPTED)
            _fail("not confirmed, nothing was done", NOT_DONE)
        except click.UsageError as error:
            _fail(f"{error.format_message()}{_see_help(error)}", USER_MISTAKE)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except NightschoolError as error:
            _fail(error.message, exit_code_of(error))
        except OSError as error:
            _fail(str(error), USER_MISTAKE)
        sys.exit(code if isinstance(code, int) else 0)


def exit_code_of(error: NightschoolError) -> int:
    """2 for what the user can mend, 1 for what is the server's or the network's."""
    is_mistake = error.code in CALLER_MISTAKES or isinstance(error, MessageTooLargeError)
    return USER_MISTAKE if is_mistake else SERVER_FAULT


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"nightschool: {message}", err=True)
    sys.exit(code)


def _see_help(error: click.UsageError) -> str:
    return f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: nightschool --home /srv/nightschool status",
)
@click.option("--address", metavar="HOST:PORT", help="The server. Default: $NIGHTSCHOOL_ADDRESS, then the home's.")
@click.option("--token", metavar="TOKEN", help="Who is asking. Default: $NIGHTSCHOOL_TOKEN, then the home's own token.")
@click.option(
    "--home", metavar="DIR", help="The server's home folder. Default: $NIGHTSCHOOL_HOME, then ~/.nightschool."
)
@click.option("--tls/--no-tls", default=None, help="Encrypt. Default: for every address but this machine's.")
@click.version_option(package_name="nightschool", prog_name="nightschool")
@click.pass_context
def nightschool(
    context: click.Context, *, address: str | None, token: str | None, home: str | None, tls: bool | None
) -> None:
    """Serve a model that learns over night, call it, and operate it."""
    context.obj = Target(address, token, home, tls)
