#!/usr/bin/env bash
# Builds a wheel: scripts/wheel.sh x86_64|aarch64 FOLDER. One wheel serves every Python from 3.10 and every torch from 2.10.
# For another architecture than this machine's it is cross-compiled, in seconds; torch's headers are the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arch=${1:?usage: scripts/wheel.sh x86_64|aarch64 FOLDER}
folder=${2:?usage: scripts/wheel.sh x86_64|aarch64 FOLDER}

if [ "$arch" != "$(uname -m)" ]; then
  compiler=${CXX:-$arch-linux-gnu-g++}
  command -v "${compiler%% *}" >/dev/null || {
    echo "error: no cross compiler $compiler: install one (Debian, Ubuntu: apt-get install g++-${arch//_/-}-linux-gnu)" >&2
    exit 1
  }
  export _PYTHON_HOST_PLATFORM=linux-$arch
fi
.venv/bin/python -m pip --disable-pip-version-check --quiet wheel . --no-build-isolation --no-deps -w "$folder"
wheel=$(ls -1 "$folder"/torch_ext-*-linux_"$arch".whl)
# On the platforms that it is named for, and there alone.
rm -f "$folder"/torch_ext-*-manylinux_*_"$arch".whl
.venv/bin/python scripts/check_wheel.py "$wheel"
