"""The command `megalite`, and `python -m megalite`."""

import sys


def main() -> int:
    """Run the command line. Ctrl-C is one line from the first import on."""
    try:
        from megalite import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as shells count SIGINT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
