# The server, for amd64 and arm64: torch_ext installed as a wheel, deploy/ copied, a bundle mounted or baked in.
#
#   docker build -f dockerfiles/server.Dockerfile --platform linux/arm64 -t torch-ext-server .
#   docker run --init --read-only -v "$PWD/bundle:/bundle:ro" -p 127.0.0.1:8000:8000 torch-ext-server
#
# Nothing runs under emulation: every stage with a RUN is for the machine that builds (cross compiler, uv resolving for
# the target), and the stages of the target's architecture only copy. Needs BuildKit. README.md beside this file has the
# targets (server, baked, wheel), the arguments, and builds behind a proxy or without an index.

# BUILD_IMAGE needs BASE_IMAGE's minor version of Python: packages are chosen and byte-compiled by it.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

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
RUN sh build.sh wheel "$BUILDARCH" "$TARGETARCH" src dist

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
    rm -rf /app/site-packages/bin && \
    find /app/site-packages -type d -name tests -prune -exec rm -rf {} + && \
    sh build.sh strip "$BUILDARCH" "$TARGETARCH" \
      /app/site-packages/uvloop /app/site-packages/httptools /app/site-packages/tokenizers && \
    chmod -R a+rX /app

FROM build AS application
ARG TARGETARCH
COPY --from=wheel / dist/
# Without the ops: there is no torch for them here.
RUN sh build.sh install "$TARGETARCH" --offline --no-deps --compile-bytecode --target /app/extension dist/*.whl && \
    rm /app/extension/torch_ext/_C.abi3.so
COPY deploy /app/deploy
COPY dockerfiles/healthcheck.py /app/healthcheck.py
# Whatever the umask of the checkout, the server's user can read it.
RUN python -m compileall -q /app/deploy && chmod -R a+rX /app

# ---- the image ---------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
WORKDIR /app
# In the order in which they change.
COPY --from=packages /app/site-packages site-packages
COPY --from=application /app/extension extension
COPY --from=application /app/deploy deploy
COPY --from=application /app/healthcheck.py healthcheck.py
# USER, HOME: the user below has no line in /etc/passwd; /tmp may be the only place it can write to.
ENV PYTHONPATH=/app/extension:/app/site-packages \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=app \
    PORT=8000
USER 65532:65532
EXPOSE 8000
# A long start: where the image's architecture is emulated, it takes half a minute.
HEALTHCHECK --interval=10s --timeout=30s --start-period=180s --retries=3 CMD ["python", "-I", "-S", "/app/healthcheck.py"]
# Start it with --init (compose: init: true): an illegal instruction in PID 1 hangs for ever under emulation.
ENTRYPOINT ["python", "-m", "deploy", "serve", "--host", "0.0.0.0"]
CMD ["/bundle"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="torch-ext server" \
      org.opencontainers.image.description="Padding-free bf16 and int8 BERT-family encoders on ARM and x86-64 CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# ---- with the bundle inside: --target baked --build-arg BUNDLE=bundle ------------------------------------------------
FROM build AS bundle
ARG BUNDLE=bundle
COPY ${BUNDLE} /bundle
RUN chmod -R a+rX /bundle

FROM runtime AS baked
COPY --from=bundle /bundle /bundle

# ---- with the bundle mounted at /bundle (the default) ----------------------------------------------------------------
FROM runtime AS server
