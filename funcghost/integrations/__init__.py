"""Trainers of other libraries: their training step is made ours, and a record of values is written along with it.

Thin: a trainer says what is optimised and when a step is made, the engine computes. It may import every wing below;
each trainer has a folder of its own, which needs the extra of its name. What they share: `taken_apart.py` (a scalar
loss as losses of samples), read first; `steps.py` (the values of a step that an optimizer makes in place), of which
`sharded.py` is for models under `fully_shard`; `identity.py` (which sample is which).
"""
