"""A notifier that records its notifications to the service manager."""


class Notifier:
    """Records notifications to the service manager."""

    watchdog_interval: float | None = 1.0
    connected = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.statuses: list[str] = []
        self.signs = 0

    def ready(self, status: str) -> None:
        self.said.append("READY")

    def reloading(self) -> None:
        self.said.append("RELOADING")

    def stopping(self, status: str) -> None:
        self.said.append("STOPPING")

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def extend_timeout(self, seconds: float) -> None:
        self.said.append("EXTEND")

    def watchdog(self) -> None:
        self.signs += 1
