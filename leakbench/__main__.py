"""``python -m leakbench``."""

from leakbench.cli.main import main

if __name__ == "__main__":
    main()
