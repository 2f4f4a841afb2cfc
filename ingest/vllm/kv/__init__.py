"""Capture of KV connectors: what each call was asked, what it answered and how long it took."""
