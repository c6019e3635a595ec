#!/usr/bin/env bash
# Builds the images for this machine, or for PLATFORM: scripts/images.sh [server|server-all|loadtest|wheel ...]
#
# Needs an engine with BuildKit. Tags: torch-ext-NAME. Settings, from the environment:
#   DOCKER        client                                         (default: docker)
#   PLATFORM      such as linux/arm64                            (default: this machine's)
#   BASE_IMAGE    what images start from, for the target         (default: the Dockerfiles')
#   BUILD_IMAGE   what builds, for this machine                  (default: BASE_IMAGE)
#   PIP_INDEX_URL another package index
#   CA            file of a CA certificate to trust while packages are fetched
# docker-bake.hcl builds the same for both architectures, with provenance.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
for name in BASE_IMAGE BUILD_IMAGE PIP_INDEX_URL; do
  [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
done
[ -z "${PLATFORM:-}" ] || arguments+=(--platform "$PLATFORM")
[ -z "${CA:-}" ] || arguments+=(--secret "id=ca,src=$CA")

[ $# -gt 0 ] || set -- server server-all loadtest
for image in "$@"; do
  case $image in
    server | server-all) file=server output=(--tag "torch-ext-$image") ;;
    wheel) file=server output=(--output dist) ;;
    loadtest) file=loadtest output=(--tag torch-ext-loadtest) ;;
    *)
      echo "error: unknown image $image: expected server, server-all, loadtest or wheel" >&2
      exit 1
      ;;
  esac
  printf '== %s\n' "$image" >&2
  DOCKER_BUILDKIT=1 "${DOCKER:-docker}" build --file "dockerfiles/$file.Dockerfile" --target "$image" \
    "${arguments[@]}" "${output[@]}" .
done
