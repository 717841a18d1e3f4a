"""`--listen` options that many tests use."""

TCP = "--listen=tcp:0:interface=127.0.0.1"
