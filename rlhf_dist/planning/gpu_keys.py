"""Keys that say something about GPUs, where there is none. Pure."""

from __future__ import annotations

from rlhf_dist.config.schema import ClusterConfig, Config
from rlhf_dist.errors import ResourceError


def check_gpu_keys(config: Config) -> None:
    """For a run on CPUs. Raises `ResourceError`: `cluster.device: auto` is known to be cpu only where it is placed."""
    if config.learner.offload != "none":
        raise ResourceError(
            f"learner.offload is {config.learner.offload}, and there is no GPU whose memory it would spare; set it to "
            "none"
        )
    if config.cluster.server_gpu_share != ClusterConfig().server_gpu_share:
        raise ResourceError(
            f"cluster.server_gpu_share is {config.cluster.server_gpu_share:g}, and there is no GPU to have a share of; "
            "take it out"
        )
