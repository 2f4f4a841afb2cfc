"""Case files: sessions with their proofs in one archive that opens, and is checked, without tokentape."""
