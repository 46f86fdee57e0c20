"""The Gated CNN block around its convolution; `dispatch` has the functions for the network."""
