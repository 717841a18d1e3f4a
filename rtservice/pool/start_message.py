"""The `start` message: the supervisor describes listeners and settings, and the worker adopts the sockets."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from rtservice.config.sources import LoadedSettings
from rtservice.config.values import as_text
from rtservice.net.listener import Listener
from rtservice.net.tls import DirectoryTLS, Files, RecordedFiles, ServerTLS
from rtservice.references import OptionValue
from rtservice.steps import Steps, finish

# Settings that a worker receives as sockets, as resolved options, and as the URL of the hub.
_RESOLVED = ("listen", "port", "interface", "protocol-option", "hub", "hub-file")


def describe(
    loaded: LoadedSettings,
    listeners: list[Listener],
    *,
    options: Iterable[OptionValue],
    hub: str = "",
    directory: str,
    read: Mapping[object, Files] | None = None,
) -> dict[str, Any]:
    """Return the value of a `start` message without `slot` and `slots`. Raises TLSError.

    `options` are the options of the protocol, with the contents of their files. `hub` is the URL of the hub, or empty.
    Certificates and keys are read here, unless `read` has them by the sources of the listeners. A worker may have no
    permission to read these files. All values are sent in this message, since other users can see the arguments of a
    process, and its child processes inherit its environment. The supervisor does not import the protocol: each worker
    does, with its privileges, and so with the current code.
    """
    texts: dict[str, str | tuple[str, ...]] = {}
    for setting, value in loaded.settings.items():
        # Defaults are left out: an alias of an option is rejected with other protocols.
        if setting.name not in _RESOLVED and value != setting.default:
            texts[setting.name] = value if setting.repeatable else as_text(value)
    described = [_described(listener, (read or {}).get(listener.source)) for listener in listeners]
    return {
        "settings": texts,
        "sources": dict(loaded.sources),  # for errors, which name the source
        "options": [dataclasses.astuple(option) for option in options],
        "listeners": described,
        "hub": hub,
        "directory": directory,
    }


def _described(listener: Listener, files: Files | None) -> dict[str, Any]:
    kind = "passed" if listener.shared else "slot" if listener.slot_sockets else "own"
    tls = None
    if listener.source is not None:
        if files is None:
            files = Files()
            finish(listener.source.loading(files, listener.reusable))
        tls = {
            "directory": isinstance(listener.source, DirectoryTLS),
            "fields": dataclasses.asdict(listener.source),
            "texts": files.texts,
            "entries": files.entries,
        }
    return {"name": listener.name, "kind": kind, "proxied": listener.proxied, "tls": tls, "file": listener.file}


def adopt_listener(described: dict[str, Any], descriptor: int) -> Steps[Listener]:
    """Return the listener that `described`, from a `start` message, has on this inherited socket. Raises TLSError."""
    os.set_inheritable(descriptor, False)  # child processes of this worker must not inherit it
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    listener = Listener(sock, described["name"], proxied=described["proxied"], shared=True)
    tls = described["tls"]
    if tls is not None:
        fields = {**tls["fields"], "alpn": tuple(tls["fields"]["alpn"])}
        source = DirectoryTLS(**fields) if tls["directory"] else ServerTLS(**fields)
        listener.adopt((yield from source.loading(RecordedFiles(tls["texts"], tls["entries"]))))
    return listener
