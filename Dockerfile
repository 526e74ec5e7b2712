# `vllm-service up` in a container, for a machine with an NVIDIA GPU; docs/docker.md tells how to build and run it.
#
# CUDA's devel image, because FlashInfer and DeepGEMM compile kernels while they run; vLLM 0.32 is built for CUDA 13.0. The digest is that
# of the index for amd64 and arm64, which others have published; it was not pulled here.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6

# Triton compiles with gcc and Python's headers; vLLM's CPU build needs libnuma.
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates gcc g++ libnuma1 python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vllm-service
COPY service/pins/light.lock service/pins/
RUN python3 -m venv .venv && \
    .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps -r service/pins/light.lock
COPY pyproject.toml README.md ./
COPY service service
RUN .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . && \
    rm -rf build service *.egg-info

# The user's cache has weights, compiled kernels and the engine's environment, which the first start builds (16 GB);
# the state has logs and boot records.
RUN useradd --create-home --uid 10001 --shell /usr/sbin/nologin vllm && \
    install -d -o vllm -g vllm /home/vllm/.cache /home/vllm/.local /home/vllm/.local/state
USER vllm
ENV HOME=/home/vllm
WORKDIR /home/vllm
VOLUME ["/home/vllm/.cache", "/home/vllm/.local/state"]

# Without a key it refuses to start, since it listens on all addresses of the container.
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m \
    CMD ["/opt/vllm-service/.venv/bin/python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health' % (os.environ.get('SERVICE_PORT') or 8000), timeout=4)"]
ENTRYPOINT ["/opt/vllm-service/.venv/bin/vllm-service"]
CMD ["up", "--host", "0.0.0.0"]
