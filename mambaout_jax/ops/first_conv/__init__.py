"""The stem's first convolution, its norm and activation; `dispatch` has the network's function."""
