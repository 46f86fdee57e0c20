"""The network and its variants."""
