#!/bin/sh
# build.sh STEP... - what the build stages of the Dockerfiles do. Architectures in Docker's names: amd64, arm64.
#
#   build.sh uv                                 install uv, unless it is there
#   build.sh compiler BUILDARCH TARGETARCH      install a C++ compiler for TARGETARCH, unless it is there
#   build.sh wheel BUILDARCH TARGETARCH SRC OUT build torch_ext's wheel for TARGETARCH with the environment /build/env
#   build.sh init BUILDARCH TARGETARCH SRC OUT  compile a static program of one C file for TARGETARCH
#   build.sh strip BUILDARCH TARGETARCH DIR...   take what only debuggers read out of TARGETARCH's libraries in folders
#   build.sh prune DIR                          remove what running programs do not read out of a folder of packages
#   build.sh requirements PYPROJECT NAME...     print requirements: of "dependencies", or of the extra of that name
#   build.sh install ARCH ARGUMENTS...          `uv pip install ARGUMENTS...` for ARCH, running none of its code; torch is a
#                                               CPU build, and a requirement that is just "torch" gets the tested version
#
#   WHEELHOUSE       a folder of wheels that are preferred to the index's, if it is there (default: /wheelhouse)
#   PIP_INDEX_URL    another index
#   PIP_NO_INDEX     1: no index at all: everything, uv too, comes from WHEELHOUSE
#   /run/secrets/ca  a CA certificate that is trusted beside the image's own
set -eu

WHEELHOUSE=${WHEELHOUSE:-/wheelhouse}

die() { echo "build.sh: error: $*" >&2; exit 1; }

# Docker's name of an architecture -> the kernel's.
machine() {
  case $1 in
    amd64) echo x86_64;;
    arm64) echo aarch64;;
    '') die "no architecture given: build with BuildKit (DOCKER_BUILDKIT=1)";;
    *) die "architecture $1: expected amd64 or arm64";;
  esac
}

# Sets cxx, and package: Debian's package that has it.
find_compiler() {
  if [ "$1" = "$2" ]; then
    cxx=g++ package=g++
  else
    cxx=$(machine "$2")-linux-gnu-g++
    package=g++-$(machine "$2" | tr _ -)-linux-gnu
  fi
}

trust_ca() {
  [ -s /run/secrets/ca ] || return 0
  cat /etc/ssl/certs/ca-certificates.crt /run/secrets/ca >/tmp/ca.pem
  trap 'rm -f /tmp/ca.pem' EXIT
  export PIP_CERT=/tmp/ca.pem SSL_CERT_FILE=/tmp/ca.pem
}

install_packages() {
  platform=$(machine "$1")-manylinux_2_28
  case $1 in
    # The index has CUDA builds, gigabytes of them; uv knows where the CPU builds are.
    amd64) torch=2.13.0 backend=cpu;;
    # The index's last one that runs without CUDA.
    arm64) torch=2.10.0 backend='';;
  esac
  shift
  if ls "$WHEELHOUSE"/torch-*.whl >/dev/null 2>&1; then backend=''; fi
  # Each argument moves from the front to the back.
  for argument do
    shift
    if [ "$argument" = torch ]; then argument=torch==$torch; fi
    set -- "$@" "$argument"
  done
  if [ -d "$WHEELHOUSE" ]; then set -- --find-links "$WHEELHOUSE" "$@"; fi
  if [ -n "$backend" ]; then set -- --torch-backend "$backend" "$@"; fi
  if [ -n "${PIP_NO_INDEX:-}" ]; then set -- --no-index "$@"
  elif [ -n "${PIP_INDEX_URL:-}" ]; then set -- --default-index "$PIP_INDEX_URL" "$@"; fi
  uv pip install --quiet --python-platform "$platform" --only-binary :all: "$@"
}

step=${1:?usage: build.sh STEP...}
shift
case $step in
  uv)
    command -v uv >/dev/null && exit 0
    trust_ca
    python -m pip install --quiet --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      --find-links "$WHEELHOUSE" 'uv>=0.6.9';;
  compiler)
    find_compiler "$@"
    command -v "$cxx" >/dev/null && exit 0
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package" >/dev/null
    rm -rf /var/lib/apt/lists/*;;
  wheel)
    find_compiler "$1" "$2"
    if [ "$1" != "$2" ]; then
      _PYTHON_HOST_PLATFORM=linux-$(machine "$2")
      export _PYTHON_HOST_PLATFORM
    fi
    CXX=$cxx CC=${cxx%++}cc PATH=/build/env/bin:$PATH uv build --quiet --offline --wheel --no-build-isolation \
      --python /build/env/bin/python --out-dir "$4" "$3"
    ls "$4"/*_"$(machine "$2")".whl;;
  init)
    find_compiler "$1" "$2"
    mkdir -p "$(dirname "$4")"
    "${cxx%++}cc" -Wall -Wextra -Werror -O2 -static -s -o "$4" "$3";;
  strip)
    find_compiler "$1" "$2"
    shift 2
    find "$@" -type f -name '*.so' -exec "${cxx%g++}strip" --strip-unneeded {} +;;
  prune)
    [ -d "${1:?}" ] || die "prune: no folder $1"
    rm -rf "${1:?}/bin" "$1/torch/include" "$1/torch/share" "$1/torch/test"
    find "$1" -type d -name tests -prune -exec rm -rf {} +
    find "$1" -type f -name '*.a' -exec rm -f {} +;;
  requirements)
    python -c 'import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
groups = {**project["optional-dependencies"], "dependencies": project["dependencies"]}
def lines(name):
    for line in groups[name]:
        if line.startswith(project["name"] + "["):  # Extras of the project itself.
            for extra in line.partition("[")[2].rstrip("]").split(","):
                yield from lines(extra)
        else:
            yield line
print(*dict.fromkeys(line for name in sys.argv[2:] for line in lines(name)), sep="\n")' "$@";;
  install)
    trust_ca
    install_packages "$@";;
  *) die "unknown step $step";;
esac
