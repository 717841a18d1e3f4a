// The usual Node echo: a stream piped into itself, with back-pressure.  Usage: echo.js PORT [KEY CERTIFICATE]
"use strict";
const fs = require("fs");
const net = require("net");
const tls = require("tls");

const [port, key, certificate] = process.argv.slice(2);

function serve(socket) {
  socket.on("error", () => socket.destroy());
  socket.write("Hello from the server!");
  socket.pipe(socket);
}

const options = { noDelay: true };
const server = key
  ? tls.createServer({ ...options, key: fs.readFileSync(key), cert: fs.readFileSync(certificate) }, serve)
  : net.createServer(options, serve);
server.listen({ port: Number(port), host: "127.0.0.1", backlog: 1024 });
