"""The Gated CNN block's convolution and gate; `dispatch` has the function for the network."""
