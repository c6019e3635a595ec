"""``python -m loadtest run|knee|report|compare|worker``: the load test with arrival times of its own.

The closed loop is Locust's: ``locust -f loadtest/locustfile.py --help``.
"""

from __future__ import annotations

import sys

from loadtest.openloop.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
