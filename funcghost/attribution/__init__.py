"""Attribution: what training samples did, as inner products of their gradients with directions made of a query.

`in_run` values a step as it is taken, `gradient` compares gradients, `curvature` and `matrix_free` make influence of
them, `projected` does so with sketches, `unrolled` goes through a whole training. Read `against.py` first: all but
`unrolled` end there. May import: all wings up to `training`.
"""
