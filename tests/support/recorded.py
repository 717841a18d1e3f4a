"""Select the records of an event."""

from collections.abc import Iterable
from typing import Any


def recorded(records: Iterable[dict[str, Any]], name: str, /, **fields: Any) -> list[dict[str, Any]]:
    """Return the records of an event with these fields, in order."""
    wanted = {"event": name, **fields}
    return [record for record in records if wanted.items() <= {key: record.get(key) for key in wanted}.items()]
