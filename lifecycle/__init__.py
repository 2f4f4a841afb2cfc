"""What time does to events: scheduled merging, tiering and verification."""
