#!/usr/bin/env bash
# A container engine, and the emulators of other architectures: scripts/engine.sh [up|down|status]
#
#   up       installs what is missing, registers the emulators, starts dockerd if none answers (the default)
#   down     stops the dockerd that `up` started, and no other
#   status   says what is there, and changes nothing
#
# For Debian and Ubuntu, with root or sudo without a password. Each step acts only where something is missing, so that the
# script can run again at any time. Settings, from the environment:
#   ARCHES        architectures to emulate, by Debian's names; empty: none         (default: arm64 amd64)
#   DOCKER_HOST   the engine's socket                                              (default: the system's)
#   DOCKERD_OPTS  more options for a dockerd that is started here. A second dockerd on one machine needs a network
#                 namespace of its own: with --bridge=none it deletes the first one's docker0
#   STATE_DIR     folder of its pid and log                                        (default: /run/torch-ext-engine)
#   WAIT_S        seconds to wait for the engine                                   (default: 60)
#
# The last line of `up` is DOCKER=PATH: a client that builds with BuildKit. A client of version 23 or newer needs the buildx
# plugin for it; without the plugin, Debian's own older client is named, which has BuildKit built in.
set -euo pipefail

ARCHES=${ARCHES-arm64 amd64}
STATE_DIR=${STATE_DIR:-/run/torch-ext-engine}
WAIT_S=${WAIT_S:-60}
SOCKET=${DOCKER_HOST:-unix:///var/run/docker.sock}
export DEBIAN_FRONTEND=noninteractive
BINFMT=/proc/sys/fs/binfmt_misc

say() { printf 'engine: %s\n' "$*"; }
die() {
  printf 'engine: error: %s\n' "$*" >&2
  exit 1
}
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

apt_updated=
apt_install() {  # only what is not installed yet; the lists are refreshed once
  local p missing=()
  for p in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ -z "$apt_updated" ]; then as_root apt-get update -qq; apt_updated=1; fi
  say "installing ${missing[*]}"
  as_root apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# ---- emulators ------------------------------------------------------------
qemu_name() {  # Debian's architecture name -> QEMU's
  case $1 in
    amd64) echo x86_64;; arm64) echo aarch64;; armhf|armel) echo arm;;
    ppc64el) echo ppc64le;; *) echo "$1";;
  esac
}

binfmt_ready() {  # registered, enabled, and with F: containers have no emulator
  local f=$BINFMT/qemu-$1   # of their own, so the kernel must hold it open
  [ -r "$f" ] && grep -qx enabled "$f" && grep -q '^flags:.*F' "$f"
}

binfmt_register() {
  local q=$1 conf
  # Packages register through binfmt-support or systemd where one is there and
  # running. Where neither did (a container, a machine without systemd), the
  # kernel takes the same line from the file that the package ships.
  for conf in /usr/lib/binfmt.d /usr/share/qemu/binfmt.d; do
    conf=$conf/qemu-$q.conf
    if [ -r "$conf" ]; then
      if [ -e "$BINFMT/qemu-$q" ]; then as_root sh -c "echo -1 >'$BINFMT/qemu-$q'"; fi
      grep '^:' "$conf" | as_root sh -c "cat >$BINFMT/register"
      return 0
    fi
  done
  if command -v update-binfmts >/dev/null; then as_root update-binfmts --enable "qemu-$q"; fi
}

emulators_up() {
  local a q
  for a in $ARCHES; do
    if [ "$a" = "$(dpkg --print-architecture)" ]; then continue; fi
    q=$(qemu_name "$a")
    # The mount first: a package that finds it registers its emulators itself.
    if [ ! -e $BINFMT/register ]; then
      say "mounting binfmt_misc"
      as_root mount -t binfmt_misc binfmt_misc $BINFMT || die "this kernel has no binfmt_misc"
    fi
    command -v "qemu-$q-static" >/dev/null || apt_install qemu-user-static
    if binfmt_ready "$q"; then
      say "$a: emulator already registered"
    else
      binfmt_register "$q"
      binfmt_ready "$q" || die "$a: the emulator could not be registered"
      say "$a: emulator registered"
    fi
  done
}

# ---- engine ---------------------------------------------------------------
find_client() {  # prints a client that can build with BuildKit
  local c major
  for c in $(type -ap docker) /usr/bin/docker; do
    [ -x "$c" ] || continue
    major=$("$c" --version | sed -n 's/^Docker version \([0-9]*\).*/\1/p')
    if [ "${major:-99}" -lt 23 ] || "$c" buildx version >/dev/null 2>&1; then
      echo "$c"; return 0
    fi
  done
  return 1
}

engine_answers() {  # any client will do to ask
  local c
  c=$(type -p docker || echo /usr/bin/docker)
  [ -x "$c" ] && DOCKER_HOST=$SOCKET timeout 20 "$c" version --format '{{.Server.Version}}' 2>/dev/null
}

cgroups_up() {
  if mountpoint -q /sys/fs/cgroup; then return 0; fi
  apt_install cgroupfs-mount
  say "mounting the cgroup controllers"
  as_root cgroupfs-mount
}

engine_up() {
  local v opts=() dev mtu pid i
  if v=$(engine_answers); then
    say "engine $v already answers"
  else
    command -v dockerd >/dev/null || apt_install docker.io iptables ca-certificates
    if v=$(engine_answers); then   # a service manager may have started it
      say "engine $v answers after its installation"
    else
      cgroups_up
      # A bridge wider than the way out loses large packets.
      dev=$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p;q' || true)
      mtu=$(cat "/sys/class/net/${dev:-none}/mtu" 2>/dev/null || echo 1500)
      if [ "$mtu" -lt 1500 ]; then opts+=("--mtu=$mtu"); fi
      as_root mkdir -p "$STATE_DIR"
      # shellcheck disable=SC2206  # DOCKERD_OPTS is a list of words
      opts+=(${DOCKERD_OPTS:-})
      say "starting dockerd ${opts[*]-}"
      # setsid: it must outlive the shell that called this script.
      # shellcheck disable=SC2016  # the inner shell expands it
      as_root sh -c 'dir=$1; shift; setsid dockerd "$@" >"$dir/dockerd.log" 2>&1 </dev/null & echo $! >"$dir/dockerd.pid"' \
        sh "$STATE_DIR" -H "$SOCKET" "${opts[@]}"
      pid=$(cat "$STATE_DIR/dockerd.pid")
      for ((i = 0; i < WAIT_S; i++)); do
        if v=$(engine_answers); then break; fi
        as_root kill -0 "$pid" 2>/dev/null || break
        sleep 1
      done
      if [ -z "${v:-}" ]; then
        tail -n 20 "$STATE_DIR/dockerd.log" >&2 || true
        as_root rm -f "$STATE_DIR/dockerd.pid"
        die "dockerd did not come up"
      fi
      say "engine $v started, pid $pid, log $STATE_DIR/dockerd.log"
    fi
  fi
  if ! find_client >/dev/null; then apt_install docker.io; fi
}

engine_down() {
  local f=$STATE_DIR/dockerd.pid pid i
  if [ ! -r "$f" ]; then say "no dockerd of this script's runs"; return 0; fi
  pid=$(cat "$f")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null || true)" = dockerd ]; then
    as_root kill "$pid"
    for ((i = 0; i < WAIT_S; i++)); do [ -e "/proc/$pid" ] || break; sleep 1; done
    [ ! -e "/proc/$pid" ] || die "dockerd $pid does not stop"
    say "stopped dockerd $pid"
  fi
  as_root rm -f "$f"
}

status() {
  local a q
  for a in $ARCHES; do
    q=$(qemu_name "$a")
    if [ "$a" = "$(dpkg --print-architecture)" ]; then say "$a: native"
    elif binfmt_ready "$q"; then say "$a: emulated by $("qemu-$q-static" --version 2>/dev/null | sed 1q || echo '?')"
    else say "$a: not runnable"; fi
  done
  say "engine: $(engine_answers | grep . || echo none)"
}

case ${1:-up} in
  up)     emulators_up; engine_up; status; c=$(find_client) || die "no client that can build"; echo "DOCKER=$c";;
  down)   engine_down;;
  status) status;;
  *)      die "usage: scripts/engine.sh [up|down|status]";;
esac
