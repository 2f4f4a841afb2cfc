"""Scripts that a person or the Makefile runs; importable, so that the demo and the tests share them."""
