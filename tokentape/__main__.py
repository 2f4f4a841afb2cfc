"""`python -m tokentape` is the program `tokentape`."""

from tokentape.cli import main

main(prog_name="tokentape")
