"""Debug mode, as everybody shares it: breakpoints, what they match, and the desk at which stopped requests are decided.

What happens in the gateway itself stands in `ingest.gateway.stops`; nothing here needs a server.
"""
