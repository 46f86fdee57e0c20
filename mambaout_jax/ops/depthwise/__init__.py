"""Depthwise convolution: one public function, one file a backend."""
