"""Where the server is and who is asking: arguments, the environment, the home folder, in this order.

The only module of the client that reads the environment. The server writes `server.json` and `cli.token` into the
home folder; the client only reads them. Turning this into a channel is `channel.py`'s.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from nightschool.errors import ConfigError, InvalidRequestError

HOME_VARIABLE = "NIGHTSCHOOL_HOME"
ADDRESS_VARIABLE = "NIGHTSCHOOL_ADDRESS"
TOKEN_VARIABLE = "NIGHTSCHOOL_TOKEN"
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 120.0
MAX_TIMEOUT_S = 24 * 3600.0
"""No call waits longer than a day, whatever it was given."""

Tls = bool | grpc.ChannelCredentials | None


@dataclass(frozen=True)
class Settings:
    """All that a client needs to know before its first call."""

    address: str
    """`host:port`, or `unix:PATH`."""
    token: str
    """Empty: none; the server will refuse."""
    home: Path
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Of a call that does not bring its own."""
    credentials: grpc.ChannelCredentials | None = None
    """None: a channel without TLS."""


def home_folder(home: str | os.PathLike[str] | None = None) -> Path:
    """The home folder: argument, $NIGHTSCHOOL_HOME, `~/.nightschool`."""
    return Path(home or os.environ.get(HOME_VARIABLE) or "~/.nightschool").expanduser()


def environment_of(
    home: str | os.PathLike[str] | None, address: str | None = None, token: str | None = None
) -> dict[str, str]:
    """The environment for a server or learner that this process becomes; what is given goes along."""
    given = {
        HOME_VARIABLE: str(home_folder(home)) if home else None,
        ADDRESS_VARIABLE: address,
        TOKEN_VARIABLE: token,
    }
    return {**os.environ, **{name: value for name, value in given.items() if value}}


def resolve(
    address: str | None = None,
    *,
    token: str | None = None,
    home: str | os.PathLike[str] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: Tls = None,
) -> Settings:
    """The settings of a client. Raises ConfigError for an address or a file that cannot be used.

    `tls` None takes TLS for every address but a loopback one; False never does.
    """
    folder = home_folder(home)
    where = address or os.environ.get(ADDRESS_VARIABLE) or _address_in(folder / "server.json") or DEFAULT_ADDRESS
    local = is_loopback(where)
    # The token in the home folder belongs to the server of this machine: it never travels to another one.
    known = token or os.environ.get(TOKEN_VARIABLE) or (_text_of(folder / "cli.token") if local else "")
    if any(not 32 < ord(char) < 127 for char in known):
        raise ConfigError("the token holds a blank or a character that is not ASCII: was it cut or pasted with others?")
    return Settings(
        address=_checked(where),
        token=known,
        home=folder,
        timeout_s=checked_timeout(timeout_s),
        credentials=_credentials(tls, local),
    )


def checked_timeout(timeout_s: float) -> float:
    """`timeout_s`, at most `MAX_TIMEOUT_S`. Raises InvalidRequestError for one that is not above 0."""
    if not timeout_s > 0:
        rule = f"must be above 0: leave it out for the client's own (by default {DEFAULT_TIMEOUT_S:g})"
        raise InvalidRequestError(f"timeout_s is {timeout_s:g}, but {rule}", field="timeout_s")
    return min(timeout_s, MAX_TIMEOUT_S)


def is_loopback(address: str) -> bool:
    """Whether what is sent to `address` stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(address: str) -> str:
    if address.startswith(("unix:", "unix-abstract:")):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"address {address!r} is not HOST:PORT or unix:PATH: write it like {DEFAULT_ADDRESS}")
    return address


def _credentials(tls: Tls, local: bool) -> grpc.ChannelCredentials | None:
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    wanted = not local if tls is None else tls
    return grpc.ssl_channel_credentials() if wanted else None


def _address_in(server_file: Path) -> str:
    text = _text_of(server_file)
    if not text:
        return ""
    try:
        found = json.loads(text)
        return str(found["address"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{server_file} names no address: remove it, or restart the server that wrote it") from None


def _text_of(path: Path) -> str:
    """The file's text, empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): mend it, or give address and token") from None
