"""The jobs behind the commands, which are also the Python API: each plan → run → result."""
