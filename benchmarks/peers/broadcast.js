// A broadcaster on Node, over Redis Pub/Sub if its port is given.  Usage: broadcast.js PORT [REDIS_PORT]
//
// Each line of a client is sent to all clients of all processes. The client of Redis is the part of RESP2 that Pub/Sub
// needs, so no package is needed.
"use strict";
const net = require("net");

const CHANNEL = "all";
const [port, redisPort] = process.argv.slice(2);
const clients = new Set();

function sendToAll(line) {
  for (const client of clients) client.write(line);
}

// Split a stream into lines, each with its line feed.
function lines(handle) {
  let rest = Buffer.alloc(0);
  return (data) => {
    if (rest.length) data = Buffer.concat([rest, data]);
    let begin = 0;
    for (let end; (end = data.indexOf(10, begin)) >= 0; begin = end + 1) handle(data.subarray(begin, end + 1));
    rest = data.subarray(begin);
  };
}

function serve(publish) {
  const server = net.createServer({ noDelay: true }, (client) => {
    clients.add(client);
    client.on("error", () => client.destroy());
    client.on("close", () => clients.delete(client));
    client.on("data", lines(publish));
    client.write("Hello from the server!");
  });
  server.listen({ port: Number(port), host: "127.0.0.1", backlog: 1024 });
}

// Return the reply that begins at `at` and its end, or null if it is not complete: [reply, end].
function reply(data, at) {
  const end = data.indexOf("\r\n", at);
  if (end < 0) return null;
  const kind = data[at];
  const number = Number(data.toString("latin1", at + 1, end));
  const begin = end + 2;
  if (kind === 36 /* $ */) {
    return data.length < begin + number + 2 ? null : [data.subarray(begin, begin + number), begin + number + 2];
  }
  if (kind !== 42 /* * */) return [number, begin];
  const items = [];
  let next = begin;
  for (let i = 0; i < number; i++) {
    const item = reply(data, next);
    if (item === null) return null;
    items.push(item[0]);
    next = item[1];
  }
  return [items, next];
}

function subscribe(subscribed, received) {
  const subscriber = net.connect({ port: Number(redisPort), host: "127.0.0.1", noDelay: true });
  let rest = Buffer.alloc(0);
  subscriber.on("data", (data) => {
    if (rest.length) data = Buffer.concat([rest, data]);
    let at = 0;
    for (let found; at < data.length && (found = reply(data, at)) !== null; at = found[1]) {
      const [kind, , body] = found[0];
      if (kind.toString() === "message") received(body);
      else subscribed();
    }
    rest = data.subarray(at);
  });
  subscriber.write(`SUBSCRIBE ${CHANNEL}\r\n`);
}

if (redisPort) {
  const publisher = net.connect({ port: Number(redisPort), host: "127.0.0.1", noDelay: true });
  publisher.resume(); // replies
  const publish = (line) => {
    publisher.cork();
    publisher.write(`*3\r\n$7\r\nPUBLISH\r\n$${CHANNEL.length}\r\n${CHANNEL}\r\n$${line.length}\r\n`);
    publisher.write(line);
    publisher.write("\r\n");
    process.nextTick(() => publisher.uncork());
  };
  subscribe(() => serve(publish), sendToAll);
} else {
  serve(sendToAll);
}
