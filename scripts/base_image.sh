#!/usr/bin/env bash
# A base image made from this machine's package mirror, where no registry can be reached: scripts/base_image.sh ARCH [TAG]
#
#   scripts/base_image.sh arm64 local/python:arm64
#   docker build --platform linux/arm64 --build-arg BASE_IMAGE=local/python:arm64 ...
#
# ARCH is Debian's name of an architecture. The image is a Debian root with Python and pip, in place of the published
# python:3.N-slim-SUITE. It keeps the mirror, proxy and download settings of this machine's apt, so that apt-get works in
# containers: do not publish it. Needs root, a running engine and, for METHOD=install and another architecture than this
# machine's, the emulator (scripts/engine.sh provides both). A tag that holds an image of that architecture stays.
#
# Settings, from the environment:
#   METHOD   install: a real installation, in which apt-get works. Scripts of packages for another architecture run under
#            emulation, which takes minutes (the default)
#            extract: packages are unpacked only, without emulation, in seconds. apt's database stays empty: enough for
#            stages that only get files copied in
#   SUITE    release of Debian                                   (default: this machine's)
#   INCLUDE  more packages, separated by commas                  (default: none)
#   FORCE    1: makes the image even if the tag is there
#   DOCKER   client                                              (default: docker)
#   WORKDIR  folder of the root's archive, about 300 MB          (default: a temporary one)
set -euo pipefail

say() { printf 'base_image: %s\n' "$*"; }
die() {
  printf 'base_image: error: %s\n' "$*" >&2
  exit 1
}

ARCH=${1:?usage: scripts/base_image.sh ARCH [TAG]}
os_release() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }
SUITE=${SUITE:-$(os_release VERSION_CODENAME)}
TAG=${2:-local/python:$SUITE-$ARCH}
METHOD=${METHOD:-install}
DOCKER=${DOCKER:-docker}
case $(os_release ID) in
  ubuntu) KEYRING_PACKAGE=ubuntu-keyring KEYRING=/usr/share/keyrings/ubuntu-archive-keyring.gpg;;
  *) KEYRING_PACKAGE=debian-archive-keyring KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg;;
esac
[ "$(id -u)" = 0 ] || die "run as root"

case $ARCH in   # Debian's architecture name -> the engine's platform
  armhf) PLATFORM=linux/arm/v7;; armel) PLATFORM=linux/arm/v5;;
  ppc64el) PLATFORM=linux/ppc64le;; i386) PLATFORM=linux/386;;
  *) PLATFORM=linux/$ARCH;;
esac

have=$("$DOCKER" image inspect --format '{{.Os}}/{{.Architecture}}' "$TAG" 2>/dev/null || true)
if [ "$have" = "${PLATFORM%/v?}" ] && [ "${FORCE:-}" != 1 ]; then
  say "$TAG is there already ($have); FORCE=1 makes it again"; exit 0
fi

missing=()
for p in mmdebstrap "$KEYRING_PACKAGE"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
fi

work=${WORKDIR:-$(mktemp -d)}; mkdir -p "$work/image"
cleanup() { rm -rf "$work/image" "$work/sources.list"; [ -n "${WORKDIR:-}" ] || rm -rf "$work"; }
trap cleanup EXIT

# The suite's own archives (release, updates, security) as apt here sees them.
# shellcheck disable=SC2016  # apt-get expands it
apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' \
  | awk -v s="$SUITE" -v k="$KEYRING" '
      $2 == s || $2 == s "-updates" || $2 == s "-security" {
        line = "deb [signed-by=" k "] " $1 " " $2 " " $3
        if (!seen[line]++) print line }' >"$work/sources.list"
grep -q " $SUITE " "$work/sources.list" || die "apt on this machine has no archive of $SUITE"

# apt's settings for fetching: proxies, time-outs, certificate and date checks.
aptopts=()
while IFS= read -r line; do aptopts+=("--aptopt=${line%;}"); done < <(
  apt-config dump | grep -E '^Acquire::(https?(::|  *")|Check-|Retries|ForceIPv)' | grep -v ' "";$' || true)

# python3.NN-venv, not python3-venv: the latter pulls in packages whose byte
# compilation takes minutes under emulation.
py=$(apt-cache depends --important python3 | sed -n 's/^ *Depends: \(python3\.[0-9]*\)$/\1/p' | sed 1q)
[ -n "$py" ] || die "apt knows no python3 (apt-get update?)"
include=ca-certificates,python3,$py,$py-venv${INCLUDE:+,$INCLUDE}

lean=()   # what a slim image has not either
for d in /usr/share/doc/'*' /usr/share/man/'*' /usr/share/info/'*' /usr/share/locale/'*' \
         /usr/share/lintian/'*'; do lean+=("--dpkgopt=path-exclude=$d"); done
lean+=('--dpkgopt=path-include=/usr/share/doc/*/copyright')

hook=$work/image/finish.sh
cat >"$hook" <<'HOOK'
#!/bin/sh
# Runs on the build machine, with the new root as $1: files only, no emulation.
set -eu
root=$1 py=$2
# What a published Python image has on its PATH: python, and a pip that
# installs. The pip is the one that Debian ships for virtual environments.
mkdir -p "$root/usr/local/bin" "$root/usr/local/lib"
ln -sf "/usr/bin/$py" "$root/usr/local/bin/python"
ln -sf "/usr/bin/$py" "$root/usr/local/bin/python3"
rm -f "$root/usr/lib/$py/EXTERNALLY-MANAGED"
site=$root/usr/local/lib/$py/dist-packages
mkdir -p "$site"
for w in "$root"/usr/share/python-wheels/pip-*.whl; do python3 -m zipfile -e "$w" "$site"; done
printf '#!/usr/bin/python3\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n' >"$root/usr/local/bin/pip"
chmod 755 "$root/usr/local/bin/pip"
ln -sf pip "$root/usr/local/bin/pip3"
# After a mere unpacking, the few things that the packages' scripts would do.
if [ ! -e "$root/etc/passwd" ]; then
  cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
  cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
  (umask 077; sed 's/^\([^:]*\):.*/\1:*:19000:0:99999:7:::/' "$root/etc/passwd" >"$root/etc/shadow")
  mkdir -p "$root/etc/ssl/certs" "$root/root" "$root/tmp" "$root/var/tmp"
  chmod 1777 "$root/tmp" "$root/var/tmp"
  find "$root/usr/share/ca-certificates" -name '*.crt' -exec cat {} + >"$root/etc/ssl/certs/ca-certificates.crt"
  [ -e "$root/usr/bin/awk" ] || ln -s mawk "$root/usr/bin/awk"
fi
rm -f "$root/etc/resolv.conf" "$root/etc/hostname"   # the engine supplies both
HOOK
chmod 755 "$hook"

case $METHOD in
  install) variant=minbase; when=customize;;
  extract) variant=extract; when=extract   # it runs no later hook
    include=$include,base-files,base-passwd,bash,coreutils,dash,debianutils,findutils,grep,gzip,libc-bin,libstdc++6,login,mawk,passwd,sed,tar,tzdata,util-linux;;
  *) die "METHOD: install or extract";;
esac

say "making $TAG: $SUITE, $PLATFORM, $METHOD"
t0=$SECONDS
mmdebstrap --quiet --variant="$variant" --architectures="$ARCH" --include="$include" \
  "${lean[@]}" "${aptopts[@]}" "--$when-hook='$hook' \"\$1\" $py" \
  "$SUITE" "$work/image/root.tar" "$work/sources.list"
say "root made in $((SECONDS - t0)) s, $(($(stat -c %s "$work/image/root.tar") / 1000000)) MB"
rm -f "$hook"

# Not "docker import --platform": engines before 23.0 keep the operating system
# of that option and record their own architecture. A build records it right.
cat >"$work/image/Dockerfile" <<'DOCKERFILE'
FROM scratch
ADD root.tar /
ENV LANG=C.UTF-8
CMD ["python3"]
DOCKERFILE
DOCKER_BUILDKIT=1 "$DOCKER" build --quiet --platform "$PLATFORM" --tag "$TAG" "$work/image" >/dev/null
say "$TAG: $("$DOCKER" image inspect --format '{{.Os}}/{{.Architecture}}, {{.Size}} bytes' "$TAG"), $((SECONDS - t0)) s in all"
