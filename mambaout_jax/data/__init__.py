"""From files to batches: sources, decoding, augmentation, Grain pipelines, on-device mixing."""
