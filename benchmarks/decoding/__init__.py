"""Whole texts: speed and block efficiency of methods, half precision, memory."""
