#!/usr/bin/env bash
# From images to a report, as a user would: scripts/e2e.sh [FOLDER]; the report and its picture go to FOLDER (default: e2e)
#
# Builds the server's image for arm64 and the load test's for this machine, runs the server hardened (under emulation, where
# this machine is none), the load test beside it, and opens the report in headless Chromium. Fails if the server is not
# healthy, a request failed, the browser shows no report, or the server does not end with 0. Settings, from the environment:
#   BUNDLE                    folder of a bundle                       (default: bundles/demo, made by `make e2e`)
#   SERVER_IMAGE, LOADTEST_IMAGE   tags that are there already         (default: built)
#   SECONDS_OF_LOAD, USERS    of the load                              (default: 90, 1: emulation takes half a second a token)
#   DOCKER, BASE_IMAGE, BASE_IMAGE_ARM64, BUILD_IMAGE, CA, PIP_INDEX_URL   see scripts/images.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-e2e}
DOCKER=${DOCKER:-docker}
BUNDLE=$(cd "${BUNDLE:-bundles/demo}" && pwd)
name=torch-ext-e2e-$$

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
browser=
for candidate in chromium chromium-browser google-chrome; do
  if command -v "$candidate" >/dev/null; then browser=$candidate && break; fi
done
[ -n "$browser" ] || die "no Chromium: install it (Debian, Ubuntu: apt-get install chromium)"

cleanup() {
  "$DOCKER" rm --force --volumes "$name-load" "$name" >/dev/null 2>&1 || true
}
trap cleanup EXIT

if [ -z "${SERVER_IMAGE:-}" ]; then
  PLATFORM=linux/arm64 BASE_IMAGE=${BASE_IMAGE_ARM64:-${BASE_IMAGE:-}} scripts/images.sh server
  SERVER_IMAGE=torch-ext-server
fi
if [ -z "${LOADTEST_IMAGE:-}" ]; then
  scripts/images.sh loadtest
  LOADTEST_IMAGE=torch-ext-loadtest
fi
mkdir -p "$out"
hardened=(--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges)

say "starting the server on arm64"
"$DOCKER" run --detach --name "$name" --platform linux/arm64 "${hardened[@]}" --cpus 1 --volume "$BUNDLE:/bundle:ro" \
  "$SERVER_IMAGE" /bundle --variant torch_ext-bf16 --max-queue-ms 60000 >/dev/null
for ((second = 0; ; ++second)); do
  state=$("$DOCKER" inspect --format '{{.State.Status}} {{.State.Health.Status}}' "$name")
  [ "$state" != "running healthy" ] || break
  if [ "$second" -ge 300 ] || [ "${state%% *}" != running ]; then
    "$DOCKER" logs "$name" >&2
    die "the server is $state after $second s"
  fi
  sleep 1
done

say "load"
"$DOCKER" run --name "$name-load" --network "container:$name" --volume /reports "${hardened[@]}" "$LOADTEST_IMAGE" \
  --host http://127.0.0.1:8000 --headless --users "${USERS:-1}" --spawn-rate 1 --run-time "${SECONDS_OF_LOAD:-90}s" --stop-timeout 60 \
  --max-chars 20 --slo-error-rate 0 --html /reports/load.html --csv /reports/load
"$DOCKER" cp "$name-load:/reports/." "$out"

say "the report in a browser"
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,1600 --virtual-time-budget=5000 \
  "--screenshot=$out/load.png" "file://$(cd "$out" && pwd)/load.html" 2>"$out/browser.log" || die "the browser failed (see $out/browser.log)"
"$browser" --headless --no-sandbox --disable-gpu --virtual-time-budget=5000 --dump-dom "file://$(cd "$out" && pwd)/load.html" \
  >"$out/load.dom.html" 2>>"$out/browser.log"
# What the browser has drawn, not what the file holds: the table is made by a script.
grep -q '/api/embed' "$out/load.dom.html" || die "the browser shows no requests (see $out/load.png)"
[ "$(stat -c %s "$out/load.png")" -gt 10000 ] || die "the picture is empty: $out/load.png"

say "stopping"
"$DOCKER" stop --time 40 "$name" >/dev/null
code=$("$DOCKER" inspect --format '{{.State.ExitCode}}' "$name")
[ "$code" = 0 ] || die "the server ended with $code"
say "done: $out/load.html, $out/load.png"
