"""``python -m loadtest run|knee|report|compare|worker``: the load test with arrival times of its own.

The closed loop is Locust's: ``locust -f loadtest/locustfile.py --help``.
"""

from __future__ import annotations

import sys

try:
    from loadtest.openloop.commands import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed; in the checkout: make wheel, then pip install "
        '"$(echo dist/torch_ext-*.whl)[loadtest]"'
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
