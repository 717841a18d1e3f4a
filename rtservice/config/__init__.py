"""Settings: value types, the schema, where values come from, and how they are shown."""
