#!/usr/bin/env bash
# The emulator that counts instructions, built from the distribution's source package: scripts/counting_emulator.sh FOLDER
#
#   FOLDER/qemu-aarch64    QEMU for one aarch64 process, with plugins. Debian's and Ubuntu's own packages of it take none
#
# Does nothing if it is there. Takes about 10 minutes on 2 slow cores, and 1 GB in FOLDER/.build while it builds. Source and
# packages come from where this machine's apt and pip get theirs; root is not needed. Settings, from the environment:
#   QEMU_SUITE    release whose source package is taken; it has to have QEMU 9.2 or newer (default: this machine's, and
#                 trixie for bookworm)
#   QEMU_SOURCE   folder of unpacked sources, in place of the source package
#   PYTHON        Python for the build (default: .venv/bin/python, else python3)
#   CC            C compiler (default: gcc)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:?usage: scripts/counting_emulator.sh FOLDER}
[ ! -x "$folder/qemu-aarch64" ] || exit 0

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
need() { command -v "$1" >/dev/null || die "no $1: install it (Debian, Ubuntu: apt-get install $2)"; }

need "${CC:-gcc}" gcc
need pkg-config pkg-config
pkg-config --exists glib-2.0 || die "no headers of glib: install them (Debian, Ubuntu: apt-get install libglib2.0-dev)"
[ -n "${QEMU_SOURCE:-}" ] || need dpkg-source dpkg-dev
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3

mkdir -p "$folder/.build"
build=$(cd "$folder/.build" && pwd)
log=$build/log

os_release() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }

# An apt of its own: source packages only, of one release, from the mirror of this machine's.
fetch_source() {
  need apt-get "Debian's or Ubuntu's apt, or set QEMU_SOURCE to a folder of QEMU's sources"
  local suite mirror component signed options
  suite=${QEMU_SUITE:-$(os_release VERSION_CODENAME)}
  # An older release of Debian has a QEMU that is too old; its mirror has the newer release, too.
  if [ -z "${QEMU_SUITE:-}" ] && [ "$suite" = bookworm ]; then suite=trixie; fi
  # shellcheck disable=SC2016  # apt-get expands it
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
    awk -v suite="$(os_release VERSION_CODENAME)" '$2 == suite {print $1; exit}')
  [ -n "$mirror" ] || die "apt on this machine has no archive of its own release"
  component=main
  [ "$(os_release ID)" != ubuntu ] || component=universe
  signed=/usr/share/keyrings/$(os_release ID)-archive-keyring.gpg
  if [ -e "$signed" ]; then signed="[signed-by=$signed]"; else signed=; fi
  mkdir -p "$build/apt/lists/partial" "$build/apt/cache/archives/partial"
  : >"$build/apt/status"
  printf 'deb-src %s %s %s %s\n' "$signed" "$mirror" "$suite" "$component" >"$build/apt/sources.list"
  options=(
    -o Dir::State="$build/apt" -o Dir::State::lists="$build/apt/lists" -o Dir::State::status="$build/apt/status"
    -o Dir::Cache="$build/apt/cache" -o Dir::Etc::sourcelist="$build/apt/sources.list" -o Dir::Etc::sourceparts=-
    -o Debug::NoLocking=1 -o APT::Sandbox::User= -qq
  )
  say "fetching QEMU's source package of $suite"
  apt-get "${options[@]}" update >"$log" 2>&1 || die "apt-get cannot read the source packages of $suite (see $log)"
  (cd "$build" && apt-get "${options[@]}" source --download-only qemu) >>"$log" 2>&1 ||
    die "no source package of QEMU in $suite (see $log): name another release by QEMU_SUITE"
  rm -rf "$build/source"
  dpkg-source --no-check -x "$build"/qemu_*.dsc "$build/source" >>"$log" 2>&1 || die "dpkg-source failed (see $log)"
}

if [ -n "${QEMU_SOURCE:-}" ]; then
  source=$(cd "$QEMU_SOURCE" && pwd)
else
  [ -e "$build/source/VERSION" ] || fetch_source
  source=$build/source
fi
version=$(cat "$source/VERSION")
[ "$(printf '%s\n' 9.2 "$version" | sort -V | head -n 1)" = 9.2 ] ||
  die "QEMU $version is too old: expected 9.2 or newer (plugins of version 4); name another release by QEMU_SUITE"

say "building QEMU $version (about 10 minutes on 2 slow cores)"
[ -x "$build/tools/bin/meson" ] || {
  "$PYTHON" -m venv "$build/tools"
  "$build/tools/bin/pip" --disable-pip-version-check --quiet install 'meson>=1.5,<2' 'ninja>=1.11,<2' tomli distlib >"$log" 2>&1 ||
    die "pip cannot install meson and ninja (see $log)"
}
mkdir -p "$build/qemu"
(
  cd "$build/qemu"
  export PATH="$build/tools/bin:$PATH"
  [ -e build.ninja ] || "$source/configure" --python="$build/tools/bin/python" --cc="${CC:-gcc}" \
    --target-list=aarch64-linux-user --without-default-features --enable-plugins --disable-system --disable-tools \
    --disable-docs --disable-install-blobs --disable-werror --disable-download
  ninja qemu-aarch64
) >"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  die "QEMU does not compile (see $log)"
}
strip -o "$folder/qemu-aarch64.new" "$build/qemu/qemu-aarch64"
mv "$folder/qemu-aarch64.new" "$folder/qemu-aarch64"
rm -rf "$build"
