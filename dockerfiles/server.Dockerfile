# The server, for amd64 and arm64: torch_ext installed as a wheel, deploy/ copied, a bundle mounted or baked in.
#
#   docker build -f dockerfiles/server.Dockerfile --platform linux/arm64 -t torch-ext-server .
#   docker run --read-only -v "$PWD/bundle:/bundle:ro" -p 127.0.0.1:8000:8000 torch-ext-server
#   docker build -f dockerfiles/server.Dockerfile --target server-all -t torch-ext-server-all .
#   docker run --read-only --tmpfs /tmp -v models:/data -p 127.0.0.1:8000:8000 torch-ext-server-all --model-id ORG/NAME
#
# Nothing runs under emulation: every stage with a RUN is for the machine that builds (cross compiler, uv resolving for
# the target), and the stages of the target's architecture only copy. Needs BuildKit. README.md beside this file has the
# targets (server, server-all, baked, wheel), the arguments, and builds behind a proxy or without an index.

# BUILD_IMAGE needs BASE_IMAGE's minor version of Python: packages are chosen and byte-compiled by it.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

# Read, never run: what it contains is listed in the bill of materials.
FROM ${BASE_IMAGE} AS base

# wheelhouse/ of the checkout, if there is one.
FROM scratch AS wheelhouse
COPY wheelhouse* /

FROM --platform=$BUILDPLATFORM ${BUILD_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/build/uv-cache
WORKDIR /build
COPY dockerfiles/build.sh /build/build.sh
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    sh build.sh uv

FROM build AS compiler
ARG BUILDARCH
ARG TARGETARCH
RUN sh build.sh compiler "$BUILDARCH" "$TARGETARCH"

# PID 1: static, so that it needs nothing of the base image.
FROM compiler AS init
ARG BUILDARCH
ARG TARGETARCH
COPY dockerfiles/init.c ./
RUN sh build.sh init "$BUILDARCH" "$TARGETARCH" init.c /app/init

# What writes the bill of materials.
FROM build AS sbom-writer
ARG BUILDARCH
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    sh build.sh install "$BUILDARCH" --target sbom 'cyclonedx-python-lib>=9,<12'
COPY dockerfiles/sbom.py ./
ARG VERSION=unknown

# ---- the wheel ---------------------------------------------------------------------------------------------------------
FROM compiler AS wheel-build
ARG BUILDARCH
ARG TARGETARCH
# torch is needed for its headers, which are the same on every architecture.
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    uv venv --quiet env && \
    sh build.sh install "$BUILDARCH" --python env/bin/python torch 'setuptools>=77' wheel ninja
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE src/
COPY torch_ext src/torch_ext
COPY scripts/check_wheel.py ./
# Refused if it needs more than manylinux_2_28 has.
RUN sh build.sh wheel "$BUILDARCH" "$TARGETARCH" src dist && \
    env/bin/python check_wheel.py dist/*.whl

# The wheel alone, for every Python from 3.10 and every torch from 2.10: --target wheel --output dist
FROM scratch AS wheel
COPY --from=wheel-build /build/dist/*.whl /

# ---- what the server imports -------------------------------------------------------------------------------------------
FROM compiler AS packages
ARG BUILDARCH
ARG TARGETARCH
# Extras of pyproject.toml: "serve onnx" for bundles whose ONNX variants are to be served.
ARG EXTRAS=serve
# Dependencies first: they change less often than the code. What talks to the model hub (30 MB, asked for by tokenizers) is
# never used here; nor are the symbols for debuggers, which take 16 of the 30 MB that these packages have otherwise.
COPY pyproject.toml ./
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    sh build.sh requirements pyproject.toml $EXTRAS >requirements.txt && \
    echo "huggingface-hub; sys_platform == 'none'" >overrides.txt && \
    sh build.sh install "$TARGETARCH" --compile-bytecode --target /app/site-packages -r requirements.txt \
      --override overrides.txt && \
    sh build.sh prune /app/site-packages && \
    sh build.sh strip "$BUILDARCH" "$TARGETARCH" \
      /app/site-packages/uvloop /app/site-packages/httptools /app/site-packages/tokenizers && \
    chmod -R a+rX /app

FROM build AS code
COPY deploy /app/deploy
COPY dockerfiles/healthcheck.py dockerfiles/entrypoint.py /app/
# Whatever the umask of the checkout, the server's user can read it.
RUN python -m compileall -q /app/deploy && chmod -R a+rX /app

FROM build AS extension
ARG TARGETARCH
COPY --from=wheel / dist/
# Without the ops: there is no torch for them here.
RUN sh build.sh install "$TARGETARCH" --offline --no-deps --compile-bytecode --target /app/extension dist/*.whl && \
    rm /app/extension/torch_ext/_C.abi3.so && \
    chmod -R a+rX /app

FROM sbom-writer AS sbom
RUN --mount=type=bind,from=base,target=/base \
    --mount=type=bind,from=packages,source=/app/site-packages,target=/packages \
    --mount=type=bind,from=extension,source=/app/extension,target=/extension \
    PYTHONPATH=sbom python sbom.py torch-ext-server "$VERSION" /base /packages /extension >sbom.cdx.json

# ---- the same with the exporter ----------------------------------------------------------------------------------------
FROM compiler AS packages-all
ARG BUILDARCH
ARG TARGETARCH
COPY pyproject.toml ./
# torch is named for its tested version. ONNX variants are left out, and so is what only programs that are compiled against
# torch read.
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    sh build.sh requirements pyproject.toml serve export >requirements.txt && \
    for name in optimum-onnx onnx onnxruntime; do echo "$name; sys_platform == 'none'"; done >overrides.txt && \
    sh build.sh install "$TARGETARCH" --compile-bytecode --target /app/site-packages torch -r requirements.txt \
      --override overrides.txt && \
    sh build.sh prune /app/site-packages && \
    sh build.sh strip "$BUILDARCH" "$TARGETARCH" \
      /app/site-packages/uvloop /app/site-packages/httptools /app/site-packages/tokenizers && \
    chmod -R a+rX /app

FROM build AS extension-all
ARG TARGETARCH
COPY --from=wheel / dist/
RUN sh build.sh install "$TARGETARCH" --offline --no-deps --compile-bytecode --target /app/extension dist/*.whl && \
    chmod -R a+rX /app && \
    mkdir -p /volumes/data && chmod 1777 /volumes/data

FROM sbom-writer AS sbom-all
RUN --mount=type=bind,from=base,target=/base \
    --mount=type=bind,from=packages-all,source=/app/site-packages,target=/packages \
    --mount=type=bind,from=extension-all,source=/app/extension,target=/extension \
    PYTHONPATH=sbom python sbom.py torch-ext-server-all "$VERSION" /base /packages /extension >sbom.cdx.json

# ---- the images --------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
WORKDIR /app
COPY --from=init /app/init init
# USER, HOME: the user below has no line in /etc/passwd; /tmp may be the only place it can write to.
ENV PYTHONPATH=/app:/app/extension:/app/site-packages \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONMALLOC=malloc \
    HOME=/tmp \
    USER=app \
    PORT=8000
USER 65532:65532
EXPOSE 8000
ARG BASE_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS served
# In the order in which they change.
COPY --from=packages /app/site-packages site-packages
COPY --from=extension /app/extension extension
COPY --from=code /app .
COPY --from=sbom /build/sbom.cdx.json sbom.cdx.json
# A long start: where the image's architecture is emulated, it takes half a minute.
HEALTHCHECK --interval=10s --timeout=30s --start-period=180s --retries=3 CMD ["python", "-I", "-S", "/app/healthcheck.py"]
ENTRYPOINT ["/app/init", "python", "/app/entrypoint.py", "serve", "--host", "0.0.0.0"]
CMD ["/bundle"]
LABEL org.opencontainers.image.title="torch-ext server" \
      org.opencontainers.image.description="Padding-free bf16 and int8 BERT-family encoders on ARM and x86-64 CPUs"

# With the exporter: --target server-all. What it exports and downloads stays in the volume.
FROM runtime AS server-all
COPY --from=packages-all /app/site-packages site-packages
COPY --from=extension-all /app/extension extension
COPY --from=extension-all /volumes /
COPY --from=code /app .
COPY --from=sbom-all /build/sbom.cdx.json sbom.cdx.json
ENV BUNDLES=/data/bundles \
    HF_HOME=/data/hub \
    DEPLOY_CACHE_DIR=/data/speeds
VOLUME ["/data"]
# The first start exports the model, which takes minutes.
HEALTHCHECK --interval=10s --timeout=30s --start-period=1800s --retries=3 CMD ["python", "-I", "-S", "/app/healthcheck.py"]
ENTRYPOINT ["/app/init", "python", "/app/entrypoint.py", "run", "--host", "0.0.0.0"]
CMD []
LABEL org.opencontainers.image.title="torch-ext server with exporter" \
      org.opencontainers.image.description="Exports a BERT-family encoder once, and serves it in bf16 or int8"

# With the bundle inside: --target baked --build-arg BUNDLE=bundle
FROM build AS bundle
ARG BUNDLE=bundle
COPY ${BUNDLE} /bundle
RUN chmod -R a+rX /bundle

FROM served AS baked
COPY --from=bundle /bundle /bundle

# With the bundle mounted at /bundle (the default).
FROM served AS server
