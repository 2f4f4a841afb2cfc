"""The endpoints that the gateway records, each an adapter between its clients, the upstream and the tape."""
