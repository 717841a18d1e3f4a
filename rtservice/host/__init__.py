"""One serving process: its lifecycle and its open connections."""
