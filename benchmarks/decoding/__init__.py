"""Decoding on one loaded pair: methods and budgets, half precision, an iteration, memory."""
