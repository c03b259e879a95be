"""The command line: `python -m funcghost check package.module:factory`, and so on; see `funcghost.shell`."""

import sys

from funcghost.shell.main import main

if __name__ == "__main__":
    sys.exit(main())
