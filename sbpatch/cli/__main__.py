"""`python -m sbpatch.cli`, as the command `sbpatch`."""

from . import main

if __name__ == "__main__":  # the processes that `eval` starts import this file too
    main()
