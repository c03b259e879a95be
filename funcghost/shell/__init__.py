"""The command line: `python -m funcghost COMMAND ...`.

May import: every wing. Read `main.py` first. The commands that need an extra are in modules of their own, which are
imported when they are called for.
"""
