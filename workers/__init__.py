"""How the activities are put together, and which worker runs which of them and which workflow."""
