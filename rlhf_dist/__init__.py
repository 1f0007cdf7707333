"""rlhf_dist: a distributed actor/learner RLHF trainer on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
