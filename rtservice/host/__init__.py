"""Processes: one serving process with its connections and limits, and the supervisor of worker processes."""
