"""The HTTP service: the front, the engine behind it, and the command line. No tensor maths in here."""
