"""A seeded simulation of the pipeline: the real code over a virtual clock, on a log and a store that fail on purpose."""
