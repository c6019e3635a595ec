"""Asks served models what their own OpenAPI documents allow, and what they do not.

There is no 5xx and nothing undescribed, and what they allow is refused by a named limit only (`contract_checks.py`).

    pip install schemathesis
    python tests/deploy/contract.py [--examples 40] [MODEL...]

where MODEL is a bundle or a folder; without any, small random models of all tasks. 40 examples for each operation are
over 2,000 cases for a model, and take a minute. Exit code 1: schemathesis found something, and says with which command
it can be repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.tasks import TASKS  # noqa: E402
from tests.deploy.conftest import make_tiny_model  # noqa: E402
from tests.deploy.test_server_bundles import serving  # noqa: E402

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,named_limit"


def main() -> int:
    """Runs, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=40, help="for each operation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20240229)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.models or [make_tiny_model(Path(folder) / task, "bert", task) for task in TASKS]
        failed = [str(model) for model in models if not holds(str(model), arguments.examples, arguments.seed)]
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return int(bool(failed))


def holds(model: str, examples: int, seed: int) -> bool:
    """Whether a model's server keeps what its document says."""
    with serving(Path(model).absolute()) as server, tempfile.TemporaryDirectory() as folder:
        print(f"== {server.line.strip()}", flush=True)
        url = f"http://127.0.0.1:{server.port}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS),
                *("--max-examples", str(examples), "--seed", str(seed), "--mode", "all"),
                *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"),
                *("--request-timeout", "20", "--generation-database", "none", "--suppress-health-check", "all"),
                *("--warnings", "off"),
            ],
            cwd=folder,  # It keeps what it found there.
            env={
                **os.environ,
                "SCHEMATHESIS_HOOKS": "tests.deploy.contract_checks",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            },
            check=False,
        )
        alive = server("GET", "/health").status == 200
        code, _, errors = server.stop()
    if not done.returncode and alive and not code and "Traceback" not in errors:
        return True
    print(f"{model}: exit code {done.returncode}; the server: {code}\n{errors[-4000:]}")
    return False


if __name__ == "__main__":
    sys.exit(main())
