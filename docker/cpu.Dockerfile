# CPU image: Ray, vLLM's CPU backend and DeepSpeed from the same pinned list as a laptop.
#   docker build -f docker/cpu.Dockerfile -t rlhf-dist:cpu .
FROM python:3.11-slim-bookworm

# libnuma1: vLLM's CPU backend is linked against it. g++: compiled decoding (rollout.enforce_eager=false) builds kernels.
# hadolint ignore=DL3008 # Debian keeps one version of each
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*

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
RUN PIP_NO_CACHE_DIR=1 launch/setup.sh cpu

COPY --chown=rlhf . .
# `ray start`, and every job it runs, finds rlhf-dist and python here.
ENV PATH=/home/rlhf/rlhf_dist/.venv/bin:$PATH
CMD ["rlhf-dist", "--help"]
