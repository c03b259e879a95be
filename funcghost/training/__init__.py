"""What a training step does with gradients: clipping, weights of samples, the geometry of a batch, optimizers' updates.

May import: all wings up to `checking`. Each file stands alone, but for those that `updates` is made of.
"""
