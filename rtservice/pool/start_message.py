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
from rtservice.net.tls import DirectoryTLS, Files, RecordedFiles, ServerTLS, Steps, finish
from rtservice.references import OptionValue


def describe(
    loaded: LoadedSettings,
    listeners: list[Listener],
    *,
    options: Iterable[OptionValue],
    directory: str,
    read: Mapping[object, Files] | None = None,
) -> dict[str, Any]:
    """The value of a `start` message, but for `slot` and `slots`. Raises TLSError.

    Certificates and keys are read here unless they are in `read`, by the sources of the listeners, and `options` with
    what their files held: a worker may not have the rights to. The values go to it in this message alone: other users
    can see a process's arguments, and what it starts inherits its environment. A protocol is not imported here: its
    workers import it, with their rights, and anew for each of them.
    """
    texts: dict[str, str | tuple[str, ...]] = {}
    for setting, value in loaded.settings.items():
        # A worker gets sockets and resolved options. An alias with its default is not given to other protocols.
        if setting.name not in ("listen", "port", "interface", "protocol-option") and value != setting.default:
            texts[setting.name] = value if setting.repeatable else as_text(value)
    described = [_described(listener, (read or {}).get(listener.source)) for listener in listeners]
    return {
        "settings": texts,
        "sources": dict(loaded.sources),  # for what errors say
        "options": [dataclasses.astuple(option) for option in options],
        "listeners": described,
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


def adopt_listener(given: dict[str, Any], descriptor: int) -> Steps[Listener]:
    os.set_inheritable(descriptor, False)  # it was inherited, and is nothing for what this process starts
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    listener = Listener(sock, given["name"], proxied=given["proxied"], shared=True)
    tls = given["tls"]
    if tls is not None:
        fields = {**tls["fields"], "alpn": tuple(tls["fields"]["alpn"])}
        source = DirectoryTLS(**fields) if tls["directory"] else ServerTLS(**fields)
        listener.adopt((yield from source.loading(RecordedFiles(tls["texts"], tls["entries"]))))
    return listener
