# syntax=docker/dockerfile:1
# Two images, with the same program and another build of torch and vLLM:
#
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... -t expertmesh:0.1.0 .
#   docker build --target cuda -t expertmesh:0.1.0-cuda .
#
# Everything that is installed stands with its hash in k8s/requirements-*.txt (k8s/lock.py makes them), so an index,
# or a mirror, can only deliver what was tested or fail. PIP_INDEX_URL: a mirror of your own in the place of pip's
# default. PIP_EXTRA_INDEX_URL: the CPU target's torch is not on the default index, see README.md.

ARG BASE=python:3.11.14-slim-bookworm

# The wheel of this source tree.
FROM ${BASE} AS wheel
ARG PIP_INDEX_URL
WORKDIR /src
COPY k8s/requirements-build.txt ./
RUN pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r requirements-build.txt
COPY LICENSE README.md pyproject.toml ./
COPY cluster cluster
COPY deploy deploy
COPY experts experts
COPY router router
RUN python -m hatchling build -t wheel -d /wheel

# A virtual environment with everything, once for each target. The last line of each: what does not import is found
# here and not in a pod.
FROM ${BASE} AS packages-cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/expertmesh
COPY k8s/requirements-cpu.txt /tmp/requirements.txt
RUN /opt/expertmesh/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /wheel /wheel
RUN /opt/expertmesh/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl \
    && /opt/expertmesh/bin/expertmesh --help

FROM ${BASE} AS packages-cuda
ARG PIP_INDEX_URL
RUN python -m venv /opt/expertmesh
COPY k8s/requirements-cuda.txt /tmp/requirements.txt
RUN /opt/expertmesh/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r /tmp/requirements.txt
COPY --from=wheel /wheel /wheel
RUN /opt/expertmesh/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl \
    && /opt/expertmesh/bin/expertmesh --help

# What both images have beside the environment. KubeRay starts pods through bash and probes them with wget; a login
# shell, which it can be told to use, would reset PATH. The root file system may be read-only: what is written at run
# time goes to HOME, to the temporary folder and to the runtime folder.
FROM ${BASE} AS common
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget=1.21.* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 expertmesh \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash expertmesh \
    && echo "PATH=/opt/expertmesh/bin:\$PATH" > /etc/profile.d/expertmesh.sh
ENV HOME=/home/expertmesh \
    PATH=/opt/expertmesh/bin:${PATH} \
    PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="expertmesh" \
      org.opencontainers.image.description="Attention-expert disaggregated serving of mixture-of-experts models" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /home/expertmesh
# HTTP, gRPC, our metrics, Ray's metrics.
EXPOSE 8000 9000 9464 8080

FROM common AS cuda
# triton compiles a small C program for each kernel when it is first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/expertmesh /opt/expertmesh
USER 10001:10001

FROM common AS cpu
# vLLM's CPU kernels are linked against libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.* \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cpu /opt/expertmesh /opt/expertmesh
USER 10001:10001
