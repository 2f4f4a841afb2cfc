"""The commands, one module per job; each lists its own in COMMANDS."""
