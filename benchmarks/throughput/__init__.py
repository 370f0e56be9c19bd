"""Throughput of many texts at once, beside the batched generation of other packages."""
