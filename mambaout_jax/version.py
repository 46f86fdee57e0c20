"""The version of the package: its only place, which setup.py reads."""

__version__ = "0.1.0"
