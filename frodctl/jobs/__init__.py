"""The jobs behind the commands, which are also the Python API: each plan → run → result."""

#: Of the JSON that every job gives; it grows with what is not an addition.
SCHEMA_VERSION = 1
