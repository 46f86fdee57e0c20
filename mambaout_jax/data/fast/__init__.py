"""The same pixels as Pillow in less time: libjpeg-turbo, and Pillow's arithmetic in Numba."""
