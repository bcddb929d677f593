"""``python -m kappa_log`` is ``kappa-log``."""

from kappa_log.cli import main

if __name__ == "__main__":
    main()
