"""Asks served models what their own OpenAPI documents allow, and what they do not: no 5xx, nothing undescribed.

    pip install schemathesis
    python tests/deploy/contract.py [--examples 10] MODEL...

where MODEL is a bundle or a folder; 10 examples for each operation are over 2,000 cases in all. Exit code 1:
schemathesis found something, and says with which command it can be repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy.test_server_bundles import serving  # noqa: E402

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> int:
    """Runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10, help="for each operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20240229)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    arguments = parser.parse_args()
    failed = []
    for model in arguments.models:
        with serving(Path(model).absolute()) as server, tempfile.TemporaryDirectory() as folder:
            print(f"== {server.line.strip()}", flush=True)
            url = f"http://127.0.0.1:{server.port}"
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS),
                    *("--max-examples", str(arguments.examples), "--seed", str(arguments.seed), "--mode", "all"),
                    *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"),
                    *("--request-timeout", "20", "--generation-database", "none", "--suppress-health-check", "all"),
                    *("--warnings", "off"),
                ],
                cwd=folder,  # It keeps what it found there.
                check=False,
            )
            alive = server("GET", "/health").status == 200
            code, _, errors = server.stop()
            if done.returncode or not alive or code or "Traceback" in errors:
                failed.append(model)
                print(f"{model}: exit code {done.returncode}; the server: {code}\n{errors[-4000:]}")
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
