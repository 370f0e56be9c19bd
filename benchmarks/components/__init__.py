"""The parts of an iteration: phases, trees, the AR head."""
