#!/usr/bin/env bash
# An aarch64 root for user-mode emulation, without a container engine and without root: scripts/arm64_root.sh FOLDER
#
#   FOLDER/usr ...      Debian's Python for arm64, unpacked, not installed
#   FOLDER/site         torch 2.10.0, onnxruntime, numpy, safetensors for it
#   FOLDER/extension    the cross-built wheel of this checkout, unpacked; made again at every call
#
# Packages come from where this machine's own apt and pip get theirs. What is there already stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:?usage: scripts/arm64_root.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
need() { command -v "$1" >/dev/null || die "no $1: install $2"; }

# An apt of its own that takes the lists and keys of this machine's, for another architecture and with nothing installed.
debian() {
  need apt-get "Debian's or Ubuntu's apt, or set ARM64_ROOT to an aarch64 root with Python 3.10 or newer"
  need dpkg-deb "dpkg"
  local state=$folder/.apt options
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  : >"$state/status"
  options=(
    -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State="$state" -o Dir::State::lists="$state/lists"
    -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" -o Dir::Log="$state" -o Debug::NoLocking=1
    -o APT::Sandbox::User= -o APT::Get::AllowUnauthenticated=false -qq
  )
  say "fetching Debian's Python for arm64"
  apt-get "${options[@]}" update >&2 || die "apt-get update for arm64 failed: do this machine's sources carry arm64?"
  apt-get "${options[@]}" install --download-only --no-install-recommends -y python3 libstdc++6 libgomp1 zlib1g >&2 ||
    die "apt-get has no Python for arm64: do this machine's sources carry arm64?"
  local package
  for package in "$state"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder"; done
  rm -rf "$state"
}

python_version() { # 3.11
  local found
  found=$(find "$folder/usr/bin" -name 'python3.[0-9]*' ! -name '*-config' -printf '%f\n' | sort -V | tail -n 1)
  [ -n "$found" ] || die "$folder has no usr/bin/python3.N"
  printf '%s\n' "${found#python}"
}

[ -e "$folder/.debian" ] || {
  debian
  touch "$folder/.debian"
}
[ -e "$folder/.site" ] || {
  say "installing torch and onnxruntime for aarch64"
  .venv/bin/python -m uv pip install --quiet --python-platform aarch64-manylinux_2_28 --python-version "$(python_version)" \
    --only-binary :all: --target "$folder/site" \
    torch==2.10.0 'onnxruntime==1.32.*' numpy 'safetensors>=0.4.3,<1'
  touch "$folder/.site"
}
rm -rf "$folder/wheels" "$folder/extension"
bash scripts/wheel.sh aarch64 "$folder/wheels" >&2
.venv/bin/python -m zipfile -e "$folder"/wheels/*aarch64.whl "$folder/extension"
