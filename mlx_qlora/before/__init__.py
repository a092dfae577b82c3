"""Before a run: its plan, its rows, and the machine."""
