"""`python -m moetier`: the command line, where `moetier` itself is not on the path."""

from moetier.cli import main

if __name__ == "__main__":
    main()
