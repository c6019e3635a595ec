# The load test (Locust), for amd64 and arm64. Same arguments as server.Dockerfile; see README.md beside this file.
#
#   docker build -f dockerfiles/loadtest.Dockerfile -t torch-ext-loadtest .
#   docker run --network container:SERVER torch-ext-loadtest --host http://127.0.0.1:8000 --headless -u 32 -r 32 -t 30s

ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

# Read, never run: what it contains is listed in the bill of materials.
FROM ${BASE_IMAGE} AS base

FROM scratch AS wheelhouse
COPY wheelhouse* /

FROM --platform=$BUILDPLATFORM ${BUILD_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
ARG TARGETARCH
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/build/uv-cache
WORKDIR /build
COPY dockerfiles/build.sh pyproject.toml ./
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    sh build.sh uv && \
    sh build.sh requirements pyproject.toml loadtest >requirements.txt && \
    sh build.sh install "$TARGETARCH" --compile-bytecode --target /app/site-packages -r requirements.txt && \
    rm -rf /app/site-packages/bin && \
    chmod -R a+rX /app && \
    mkdir /reports

# The load test takes its texts from deploy/texts.py, and nothing else of deploy/.
FROM build AS application
COPY loadtest /app/loadtest
COPY deploy/__init__.py deploy/ending.py deploy/extras.py deploy/texts.py /app/deploy/
RUN python -m compileall -q /app/loadtest /app/deploy && chmod -R a+rX /app/loadtest /app/deploy

# PID 1: static, so that it needs nothing of the base image.
FROM build AS init
ARG BUILDARCH
ARG TARGETARCH
RUN sh build.sh compiler "$BUILDARCH" "$TARGETARCH"
COPY dockerfiles/init.c ./
RUN sh build.sh init "$BUILDARCH" "$TARGETARCH" init.c /app/init

FROM build AS sbom
ARG BUILDARCH
RUN --mount=type=secret,id=ca --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/build/uv-cache \
    sh build.sh install "$BUILDARCH" --target sbom 'cyclonedx-python-lib>=9,<12'
COPY dockerfiles/sbom.py ./
ARG VERSION=unknown
RUN --mount=type=bind,from=base,target=/base \
    PYTHONPATH=sbom python sbom.py torch-ext-loadtest "$VERSION" /base /app/site-packages >sbom.cdx.json

FROM ${BASE_IMAGE} AS loadtest
WORKDIR /app
COPY --from=init /app/init init
COPY --from=build /app/site-packages site-packages
COPY --from=application /app/deploy deploy
COPY --from=application /app/loadtest loadtest
COPY --from=build --chown=65532:65532 /reports /reports
COPY --from=sbom /build/sbom.cdx.json sbom.cdx.json
ENV PYTHONPATH=/app/site-packages \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=app
USER 65532:65532
# It serves nothing that could be asked for its health.
HEALTHCHECK NONE
ENTRYPOINT ["/app/init", "python", "-m", "locust", "-f", "/app/loadtest/locustfile.py"]
CMD ["--help"]
ARG BASE_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="torch-ext load test" \
      org.opencontainers.image.description="Locust with ragged real text and limits that decide its exit code" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
