"""DeepSpeed ZeRO behind a few verbs; the only importer of deepspeed.

`forward`, `backward`, `step`, `named_weights`, and which part of the optimizer this rank has. The loss given to
`backward` is already divided by *global* counts, so the gradients of the ranks are to be added; DeepSpeed averages
them, which is undone here.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlhf_dist.config.schema import OptimizerConfig
from rlhf_dist.errors import NumbersError
from rlhf_dist.learner.changed_words import Part, Run
from rlhf_dist.learner.numbers_gate import ask_before_step
from rlhf_dist.models.by_parameter import Scatter
from rlhf_dist.planning.memory import REDUCE_BUCKET
from rlhf_dist.weights.own_address import interface_of

LOOPBACK = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where gloo and nccl read the network interface to use."""


class DeepSpeedEngine:
    """One rank of a model under ZeRO 0, 1, 2 or 3."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        *,
        zero_stage: int,
        dtype: str,
        device: str,
        offload: bool = False,
    ) -> None:
        """Every rank calls this with the same weights, after `init_process_group`.

        `offload`: the optimizer's masters and moments lie in the host's memory, and it steps there.
        """
        import deepspeed

        self._zero = deepspeed.zero
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.zero_stage = zero_stage
        self.device = torch.device(device)
        self._max_grad_norm = optimizer.max_grad_norm
        self._base_optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            # One pass over the weights instead of ten. On a GPU its `step` would have to be a tensor there.
            fused=self.device.type == "cpu" or offload,
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._base_optimizer,  # pyright: ignore[reportArgumentType]
            config=engine_config(
                zero_stage, dtype, optimizer.max_grad_norm, sum(map(whole_size, module.parameters())), offload
            ),
        )
        self._engine: Any = engine
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.passes = self.micro_batches = self.steps = 0
        """Forward passes, backward passes and optimizer steps so far: read by another thread."""
        if zero_stage == 0 and self.world_size == 1:
            engine.enable_backward_allreduce = False  # it would copy all gradients twice to add up one rank's
        self.refuses: Callable[[float], bool] | None = None
        """Asked with the global gradient norm before each optimizer step; it answers alike on all ranks. None: a norm
        that is not finite is an error."""
        self.refused = False
        """Whether the last optimizer step was not taken."""
        self._norm = 0.0
        if zero_stage:
            ask_before_step(engine.optimizer, zero_stage, self._ask)

    def forward(self, *args: Any) -> Any:
        """The module's forward, with ZeRO's hooks."""
        self.passes += 1
        return self._engine(*args)

    def equally_often(self, count: int, usual: int) -> int:
        """How often to call a module that this rank needs `count` times in one pass.

        Under ZeRO 3 each call gathers the module's weights from all ranks, so all make as many: as the rank that needs
        most, and `usual` at least, since DeepSpeed fetches weights ahead only while each pass is like the one before.
        """
        if self.zero_stage < 3 or self.world_size == 1:
            return count
        most = torch.tensor(max(count, usual), device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch; `last` tells that the optimizer step follows."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_factor)
        self.micro_batches += 1

    @property
    def loss_factor(self) -> int:
        """What a loss is multiplied by before its backward pass: DeepSpeed averages over so many ranks."""
        return self.world_size

    def step(self, lr: float) -> float:
        """One optimizer step at this learning rate; returns the global gradient norm before clipping.

        Where `refuses` says so, the gradients are forgotten and nothing else is changed. Without it raises
        `NumbersError` for a norm that is not finite, the weights as they were.
        """
        self.steps += 1
        for group in self._base_optimizer.param_groups:
            group["lr"] = lr
        if self.zero_stage == 0:
            # Gradients are whole on every rank here, and DeepSpeed would clip them without telling their norm.
            parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
            if self._ask(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)):
                self._engine.zero_grad()
            else:
                self._engine.step()
        else:
            self._engine.step()
        if self.refused and self.refuses is None:
            raise NumbersError(f"the gradient norm is {self._norm}: a loss or an input is not finite")
        return self._norm

    def _ask(self, norm: Tensor) -> bool:
        """Whether the step with gradients of this norm is refused."""
        self._norm = float(norm)
        self.refused = not math.isfinite(self._norm) if self.refuses is None else self.refuses(self._norm)
        return self.refused

    def named_weights(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters in the module's order, all or the wanted; under ZeRO 3 gathered one by one, by every rank,
        to the end."""
        for name, parameter in self._engine.module.named_parameters():
            if wanted is not None and name not in wanted:
                continue
            gathered = self._zero.GatheredParameters([parameter]) if self.zero_stage == 3 else nullcontext()
            with gathered:
                yield name, parameter.detach()

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and whole shape of each parameter, without gathering."""
        return [
            (name, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self._engine.module.named_parameters()
        ]

    def of_all_ranks(self, mine: Any) -> list[Any]:
        """What each rank gives, by rank; every rank calls it."""
        everyone: list[Any] = [mine] * self.world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def to_rank_0(self, mine: bytes) -> list[bytes]:
        """What each rank gives, by rank, on rank 0; nothing on the others. Every rank calls it."""
        everyone: list[Any] = [b""] * self.world_size if self.rank == 0 else []
        torch.distributed.gather_object(mine, everyone or None)
        return everyone

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that steps the masters."""
        return self._base_optimizer

    def parts(self) -> list[Part]:
        """What this rank's optimizer steps, and the model's words that it becomes: the parameters themselves under
        ZeRO 0."""
        optimizer, named = self._engine.optimizer, list(self._engine.module.named_parameters())
        if self.zero_stage == 0:
            return [Part(held, held.detach().view(-1), (Run(name, 0, 0, held.numel()),)) for name, held in named]
        if self.zero_stage == 3:
            words = list(optimizer.fp16_partitioned_groups_flat)
            # (name, this rank's words of it, the first of them in the parameter, how many are no filling)
            own = []
            for name, parameter in named:
                held: Tensor = parameter.ds_tensor
                begin = self.rank * int(held.ds_numel)  # pyright: ignore[reportAttributeAccessIssue]
                own.append((name, held, begin, min(held.numel(), int(parameter.ds_numel) - begin)))
        else:
            stage_1 = hasattr(optimizer, "bf16_partitioned_groups")
            groups = optimizer.bf16_partitioned_groups if stage_1 else optimizer.parallel_partitioned_bit16_groups
            words = [group[self.rank] for group in groups]
            own = [(name, parameter, 0, parameter.numel()) for name, parameter in named]
        return [
            Part(master, part, tuple(run for one in own if (run := run_in(part, *one)) is not None))
            for master, part in zip(self._masters(), words, strict=True)
        ]

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that the optimizer steps, whatever ZeRO's stage calls them; from stage 1 on."""
        optimizer = self._engine.optimizer
        for attribute in (
            "fp32_partitioned_groups_flat",  # ZeRO 3
            "single_partition_of_fp32_groups",  # ZeRO 1 and 2
            "fp32_groups_flat_partition",  # bf16 with ZeRO 1
        ):
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        raise AssertionError(f"{type(optimizer).__name__}: no float32 tensors under ZeRO {self.zero_stage}")


def run_in(part: Tensor, name: str, held: Tensor, begin: int, count: int) -> Run | None:
    """What lies in the memory of `part` of the `count` words of `held`, the first of which is number `begin` of a
    parameter."""
    ahead = (held.data_ptr() - part.data_ptr()) // part.element_size()
    first, end = max(ahead, 0), min(ahead + count, part.numel())
    return Run(name, begin + first - ahead, first, end - first) if first < end else None


def whole_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, on a rank that may have a part of it only."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def zero_scatter(zero_stage: int, dtype: str, max_grad_norm: float) -> Scatter | None:
    """Under ZeRO 3: gives each rank its part of a parameter that rank 0 has read. Else None: all have them whole."""
    if zero_stage < 3:
        return None
    import deepspeed

    config = engine_config(zero_stage, dtype, max_grad_norm, REDUCE_BUCKET)

    def give(parameter: nn.Parameter) -> None:
        holder = nn.Module()
        holder.register_parameter("kept", parameter)
        deepspeed.zero.Init(module=holder, config_dict_or_path=config)

    return Scatter(give, torch.distributed.get_rank() == 0)


def engine_config(
    zero_stage: int, dtype: str, max_grad_norm: float, parameters: int, offload: bool = False
) -> dict[str, Any]:
    """DeepSpeed's own config. Batch sizes are formal: micro-batches are ragged and their boundary is set by hand.

    `parameters`: elements of the whole model; the buffer for gradients on their way is no larger.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            # DeepSpeed makes this buffer of 5e8 elements for every model: 1 GB, or 2 in float32.
            "reduce_bucket_size": min(REDUCE_BUCKET, parameters),
        },
        "zero_allow_untested_optimizer": True,
        # torch's AdamW on the CPU: DeepSpeed's own would be compiled at start.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0 if zero_stage == 0 else max_grad_norm,
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # Micro-batches are added up in float32: bf16 has 8 bits and loses the small ones.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def init_process_group(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    *,
    device: str,
    threads: int,
    timeout_s: float,
    own_address: str = LOOPBACK,
) -> None:
    """Join the ranks: gloo on a CPU, nccl on a GPU. Waits at most `timeout_s` for the others, in every collective.

    `own_address`: of this rank's node, on which it listens for the others. Both libraries are told its interface, since
    gloo would take the host's outside one; between nodes what the environment says comes first.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",  # each rank is a process that sees its own device only
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    if interface := interface_of(own_address):
        for name in INTERFACES:
            os.environ[name] = interface if own_address == LOOPBACK else os.environ.get(name, interface)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(threads)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Its shared-memory all-reduce would be compiled at start, which fails on a machine without a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    backend, limit = "gloo" if device == "cpu" else "nccl", timedelta(seconds=timeout_s)
    store = meeting_point(rank, world_size, address, port, limit)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=limit, verbose=False)


def meeting_point(rank: int, world_size: int, address: str, port: int, limit: timedelta) -> TCPStore:
    """Where the ranks find each other. Rank 0 serves it at `address` only; torch itself would listen on all."""
    listening = None
    if rank == 0:
        with socket.create_server((address, port)) as server:
            listening = server.detach()
    return TCPStore(address, port, world_size, is_master=rank == 0, timeout=limit, master_listen_fd=listening)
