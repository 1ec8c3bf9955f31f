"""`python -m masa`."""

from masa.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
