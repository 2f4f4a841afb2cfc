"""How events come back: fold, player, timeline, engines, compare."""
