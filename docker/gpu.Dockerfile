# GPU image. CUDA itself comes with the pinned Python packages; the host brings the NVIDIA driver (580 or newer) and the
# NVIDIA container toolkit.
#   docker build -f docker/gpu.Dockerfile -t rlhf-dist:gpu .
FROM python:3.11-slim-bookworm

# g++: Triton compiles a launcher for each kernel when it is first used.
# hadolint ignore=DL3008 # Debian keeps one version of each
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# What NVIDIA's own images set: the container toolkit passes the GPUs and the driver's compute libraries into the image.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Ray lets anyone with the token run code: not as root.
RUN useradd --create-home --uid 1000 rlhf
# By number, so that Kubernetes can see that it is not root.
USER 1000
WORKDIR /home/rlhf/rlhf_dist

# First only what decides the environment, so that an edit of the code does not install everything again. The package is
# installed in editable form: its sources, copied below, are found where this layer has only the version.
COPY --chown=rlhf launch launch
COPY --chown=rlhf pyproject.toml README.md LICENSE ./
COPY --chown=rlhf rlhf_dist/__init__.py rlhf_dist/__init__.py
RUN PIP_NO_CACHE_DIR=1 launch/setup.sh gpu

COPY --chown=rlhf . .
# `ray start`, and every job it runs, finds rlhf-dist and python here.
ENV PATH=/home/rlhf/rlhf_dist/.venv/bin:$PATH
CMD ["rlhf-dist", "--help"]
