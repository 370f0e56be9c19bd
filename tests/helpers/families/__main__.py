"""See the package."""

import sys
from importlib import import_module

from . import main

main(import_module(f".{sys.argv[1]}", __package__), sys.argv[2:])
