"""Connect many clients to a port, some at a time; print how many were served and refused, as JSON."""

import json
import selectors
import socket
import sys

sys.stdin.readline()  # wait until the test starts the flood
port, count, at_once = map(int, sys.argv[1:])
selector = selectors.DefaultSelector()
results = {"served": 0, "refused": 0}
begun = 0
while sum(results.values()) < count:
    while begun < count and len(selector.get_map()) < at_once:
        client = socket.socket()
        client.bind((f"127.0.1.{begun % 100 + 1}", 0))
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        selector.register(client, selectors.EVENT_READ)
        begun += 1
    for key, _ in selector.select(10):
        client = key.fileobj
        try:
            served = bool(client.recv(100))
        except ConnectionResetError:
            served = False
        results["served" if served else "refused"] += 1
        selector.unregister(client)
        client.close()
print(json.dumps(results))
