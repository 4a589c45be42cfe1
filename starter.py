"""Start, watch and steer Tidegate: `python starter.py --help`."""

from cli.main import main

if __name__ == "__main__":
    main()
