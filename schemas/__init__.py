"""What an event is and how it evolves: schemas, codec, models, errors and settings. No I/O."""
