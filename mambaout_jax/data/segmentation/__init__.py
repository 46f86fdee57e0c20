"""Semantic segmentation: images with masks, their augmentation and their evaluation pixels."""
