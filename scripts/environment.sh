#!/usr/bin/env bash
# Sets up .venv: scripts/environment.sh demo | dev | kubernetes | newest | build
#
#   demo        torch, the extension built in place, and what export, server and load test need
#   dev         the same, and the tools of tests and lint
#   kubernetes  what the tests of the manifests need, beside dev
#   newest      transformers 5 in .venv/newest, to be laid over dev, whose ONNX exporter needs transformers 4
#   build       compiles the extension again, in place
#
# torch is installed first and alone, and held there: nothing that comes later may replace it by another build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
PYTHON=${PYTHON:-python3}

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The messages name the packages of Debian and Ubuntu.
check_tools() {
  command -v "$PYTHON" >/dev/null || die "no $PYTHON: install Python 3.10 or newer (Debian, Ubuntu: apt-get install python3 python3-venv)"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$PYTHON" --version 2>&1) is too old: choose Python 3.10 or newer, as in: make PYTHON=python3.12 ..."
  command -v "${CXX:-g++}" >/dev/null || die "no C++ compiler ${CXX:-g++}: install one (Debian, Ubuntu: apt-get install g++), or set CXX"
}

# torch.compile compiles against them when its tests run.
check_headers() {
  "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    die "$PYTHON has no headers: install its dev package (Debian, Ubuntu: apt-get install python3-dev)"
}

make_venv() {
  if [ ! -x "$VENV/bin/python" ]; then
    # Debian and Ubuntu split venv's pip off; virtualenv brings its own.
    if "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
      "$PYTHON" -m venv "$VENV"
    elif "$PYTHON" -m virtualenv --version >/dev/null 2>&1; then
      "$PYTHON" -m virtualenv --quiet "$VENV"
    else
      die "$PYTHON cannot make virtual environments: install its venv package (Debian, Ubuntu: apt-get install python3-venv)"
    fi
  fi
  # An environment that somebody else made, or that was left half made.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 ||
    die "$VENV has no pip and cannot get one: remove it (make distclean), and it is made again"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

# The CPU builds that are tested. Newer aarch64 builds on the index need CUDA's libraries.
default_torch() {
  case $(uname -m) in
    aarch64 | arm64) echo 'torch==2.10.0' ;;
    *) echo 'torch==2.13.0' ;;
  esac
}

# Whether the environment's torch meets a requirement.
has_torch() {
  "$VENV/bin/python" - "$1" <<'PY'
import importlib.metadata
import sys

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement

try:
    requirement = Requirement(sys.argv[1])
    version = importlib.metadata.version("torch")
    found = not requirement.url and requirement.specifier.contains(version, prereleases=True)
except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
    found = False
sys.exit(not found)
PY
}

# A torch that is there stays, unless TORCH asks for another.
install_torch() {
  local wanted=${TORCH:-$(default_torch)}
  if ! has_torch "${TORCH:-torch>=2.10}"; then
    say "installing $wanted"
    pip install "$wanted" || die "cannot install $wanted: is there a build for this Python on your index? Others by: make TORCH=..."
  fi
  "$VENV/bin/python" -c 'import importlib.metadata; print("torch==" + importlib.metadata.version("torch"))' >"$VENV/constraints.txt"
  pip install 'setuptools>=77' wheel ninja -c "$VENV/constraints.txt"
}

# Compiling needs no network and no second torch: the environment's own is used.
build() {
  say "compiling the extension"
  local log=$VENV/build.log
  "$VENV/bin/python" setup.py --quiet build_ext --inplace >"$log" 2>&1 || {
    cat "$log" >&2
    die "the extension does not compile (see above)"
  }
  touch "$VENV/.built"
}

install() {
  check_tools
  [ "$1" != dev ] || check_headers
  make_venv
  install_torch
  say "installing what ${1} needs"
  # Only the extras: the extension itself is compiled in place, and found from this folder.
  pip install --no-build-isolation -c "$VENV/constraints.txt" -e ".[$1]"
  touch "$VENV/.built" "$VENV/.$1"
}

case ${1-} in
  demo) install demo ;;
  dev)
    install dev
    touch "$VENV/.demo"
    ;;
  kubernetes) install kubernetes ;;
  newest)
    say "installing transformers 5"
    pip install --upgrade --no-warn-conflicts --target "$VENV/newest" 'transformers>=5.24,<6'
    touch "$VENV/.newest"
    ;;
  build)
    check_tools
    build
    ;;
  *) die "usage: scripts/environment.sh demo|dev|kubernetes|build" ;;
esac
