"""Pillow's pixels sooner: libjpeg-turbo called directly, and Pillow's arithmetic by Numba."""
