// All images for both architectures: docker buildx bake. One of them: docker buildx bake server.
//
//   docker buildx bake --set '*.platform=linux/arm64'      # one architecture
//   REGISTRY=my-registry/ VERSION=1.2 BASE_DIGEST=sha256:... docker buildx bake --push
//
// `make images` builds them for this machine with any engine that has BuildKit. Provenance and, where the builder has the
// scanner, a bill of materials are attached to what is pushed; each image also has its own, /app/sbom.cdx.json.

variable "REGISTRY" {
  default = ""
}

variable "VERSION" {
  default = "latest"
}

variable "REVISION" {
  default = "unknown"
}

// What images start from, for the targets, and what builds them, for the builder; both need the same minor version of Python.
variable "BASE_IMAGE" {
  default = "python:3.11-slim-bookworm"
}

variable "BUILD_IMAGE" {
  default = BASE_IMAGE
}

// sha256:..., of the index of all architectures: a base that never changes, whatever its tag names later.
variable "BASE_DIGEST" {
  default = ""
}

variable "BUILD_DIGEST" {
  default = BUILD_IMAGE == BASE_IMAGE ? BASE_DIGEST : ""
}

group "default" {
  targets = ["server", "server-all", "loadtest"]
}

target "common" {
  context   = "."
  platforms = ["linux/amd64", "linux/arm64"]
  args = {
    BASE_IMAGE  = join("@", compact([BASE_IMAGE, BASE_DIGEST]))
    BUILD_IMAGE = join("@", compact([BUILD_IMAGE, BUILD_DIGEST]))
    VERSION     = VERSION
    REVISION    = REVISION
  }
  attest = ["type=provenance,mode=max", "type=sbom"]
}

target "server" {
  inherits   = ["common"]
  dockerfile = "dockerfiles/server.Dockerfile"
  target     = "server"
  tags       = ["${REGISTRY}torch-ext-server:${VERSION}"]
}

target "server-all" {
  inherits   = ["common"]
  dockerfile = "dockerfiles/server.Dockerfile"
  target     = "server-all"
  tags       = ["${REGISTRY}torch-ext-server-all:${VERSION}"]
}

target "loadtest" {
  inherits   = ["common"]
  dockerfile = "dockerfiles/loadtest.Dockerfile"
  target     = "loadtest"
  tags       = ["${REGISTRY}torch-ext-loadtest:${VERSION}"]
}

// Wheels for manylinux_2_28, into dist/.
target "wheel" {
  inherits   = ["common"]
  dockerfile = "dockerfiles/server.Dockerfile"
  target     = "wheel"
  output     = ["type=local,dest=dist"]
  attest     = []
}
