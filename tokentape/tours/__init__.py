"""Guided tours of an engine: a small run is recorded, and what it did is explained from the tape."""
