"""Settings that are aliases of options of a shipped protocol, such as `--greeting`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rtservice.config.schema import Setting
from rtservice.config.values import whole_number
from rtservice.hosting.options import options_of
from rtservice.protocols.echo import EchoFactory


def _aliases(protocol: str, factory: Any) -> Iterator[Setting]:
    """Yield the settings that a factory declares as aliases of options of the protocol."""
    options = options_of(factory)
    for alias in factory.aliases:
        option = options[alias.name.replace("-", "_")]
        kind = option.kind if alias.bounds is None else whole_number(*alias.bounds)
        assert kind is not None
        yield Setting(
            name=alias.name,
            topic=f"The {protocol} protocol",
            kind=kind,
            default=option.default,
            help=alias.help,
            metavar=alias.metavar or kind.metavar,
            protocol=protocol,
        )


# Only shipped protocols have aliases. The options of the command line are declared before it is parsed, and any other
# protocol is imported after that, with workers even in another process. And a package that happens to be installed must
# not add options to the command.
ALIASES = tuple(_aliases("echo", EchoFactory))
