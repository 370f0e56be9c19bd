"""The conditional heads of drafters: one module each, with its mathematics and its tensors."""
