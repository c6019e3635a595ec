"""``python -m loadtest run|knee|report|compare|self-check|worker``: the load test with arrival times of its own.

The closed loop is Locust's: ``locust -f loadtest/locustfile.py --help``.
"""

from __future__ import annotations

import sys

from deploy.ending import end
from deploy.extras import how_to_install, is_ours, other_python


def _run() -> int:
    try:
        from loadtest.openloop.commands import main
    except ModuleNotFoundError as error:
        if is_ours(error):
            raise
        how = f"{how_to_install('loadtest')}{other_python()}"
        print(f"error: {error.name} is not installed; in the checkout: {how}", file=sys.stderr)
        return 2  # 1 would be a missed limit.
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(end(_run))
