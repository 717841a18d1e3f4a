"""Settings: value types, the schema, where values come from, and their representation as text."""
