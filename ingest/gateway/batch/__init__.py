"""Batch work: files of requests that wait in a log per model and go the way of interactive requests, after them."""
