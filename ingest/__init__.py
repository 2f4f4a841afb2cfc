"""How events get in: recorder, spool, gateway."""
