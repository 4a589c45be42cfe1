"""Pure decisions: no I/O, no clock, no randomness. `now` and random generators are arguments."""
