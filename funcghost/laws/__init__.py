"""What is held to autograd: the conservation law of scores, the law of factors, and the slow truth.

May import: all wings up to `engine`. Read `conservation.py` first; `draws.py` has the weights, directions and
tolerances of all of them.
"""
