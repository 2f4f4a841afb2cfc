"""What a child process does with connections that came over a fork: nothing, not even closing them."""

from __future__ import annotations

import ctypes


def forget(*connections: object) -> None:
    """Keep `connections` from ever being closed in this process.

    Closing one here could delete SQLite's write-ahead log under the parent, say goodbye to a broker in the
    parent's name, or wait for threads that did not come along. The garbage collector would do the same, up to the
    very end of the interpreter: an extra reference stops it.
    """
    for connection in connections:
        if connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
