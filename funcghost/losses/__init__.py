"""Ways to write `losses(params, batch) -> [b]`: of a module, of one example, with a head that is taken in chunks.

May import: the root, `algebra` and `ops`. Read `modules.py` and `examples.py` first; `funcghost.functional` is part of
this wing.
"""
