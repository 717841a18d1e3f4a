"""A WebSocket server of autobahn."""

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol


class Echoes(WebSocketServerProtocol):
    def onMessage(self, payload, is_binary):
        self.sendMessage(payload, is_binary)


def factory():
    factory = WebSocketServerFactory()
    factory.protocol = Echoes
    return factory
