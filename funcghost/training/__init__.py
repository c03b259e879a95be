"""What a training step does with per-sample gradients: clipping, weights of samples, the geometry of a batch.

May import: all wings up to `checking`. Each file stands alone.
"""
