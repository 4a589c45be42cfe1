"""Start, watch and steer Tidegate: `python starter.py --help`."""

from cli.main import app

if __name__ == "__main__":
    app()
