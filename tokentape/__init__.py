"""The face of tokentape: command line, settings loading, services, public Python API."""

__version__ = "0.1.0"
