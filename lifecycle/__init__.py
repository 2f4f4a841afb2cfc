"""What time does to events: merging, tiering, retention, legal holds, erasure and verification, on a schedule."""
