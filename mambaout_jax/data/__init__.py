"""From files to batches: sources, decoding, augmentation, and batches made ahead of time."""
