"""The NumPy backend: slow, short, and the oracle that every other backend is held to."""
