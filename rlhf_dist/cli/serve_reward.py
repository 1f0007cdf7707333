"""`rlhf-dist serve-reward`: the rewards of a config for runs elsewhere, over HTTP."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cli import arguments
from rlhf_dist.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.config.schema import Config, RewardSpec
    from rlhf_dist.scoring.scorer import CheckModel, MakeModel

HOST, PORT = "127.0.0.1", 8070


def run(argv: Sequence[str]) -> int:
    """Serve the config's `scoring` section until stopped from the keyboard."""
    parser = arguments.config_parser(
        "serve-reward", "Answer POST /score with the rewards of the config's scoring section, until Ctrl-C."
    )
    parser.add_argument("--host", default=HOST, help=f"address to listen at; default {HOST}, this machine only")
    parser.add_argument("--port", type=_port, default=PORT, help=f"default {PORT}; 0: a free one")
    parser.add_argument(
        "--token-env", default="", metavar="NAME", help="variable with the token that clients must send"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, start nothing")
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "serve-reward", "eval")
    names = ", ".join(config.scoring.rewards)
    if args.dry_run:
        from rlhf_dist.config.load import to_yaml

        print(to_yaml(config) + f"# would serve {names} at http://{args.host}:{args.port}/score")
        return 0
    from rlhf_dist.config.addresses import is_loopback
    from rlhf_dist.scoring.bound_server import bind
    from rlhf_dist.scoring.http_calls import read_token

    token = read_token(args.token_env, "--token-env") if args.token_env else ""
    with closing(bind(args.host, args.port)) as bound:
        if not token and not is_loopback(bound.getsockname()[0]):
            raise ConfigError(
                f"--host {args.host}: others reach this address, so it needs a token: put one into a variable of the "
                "environment and name that with --token-env, or listen at 127.0.0.1"
            )
        _serve(config, bound, token, lambda at: print(f"serving {names} at {at}/score (stop with Ctrl-C)", flush=True))
    return 0


def _serve(config: Config, bound: socket.socket, token: str, ready: Callable[[str], None]) -> None:
    from rlhf_dist.scoring.bound_server import BoundServer
    from rlhf_dist.scoring.http_server import make_app
    from rlhf_dist.scoring.scorer import Scorer, preflight

    check_model = make_model = None
    if any(spec.kind == "model" for spec in config.scoring.rewards.values()):
        check_model, make_model = _models(config)
    preflight(config.scoring, check_model)
    with closing(Scorer(config.scoring, make_model)) as scorer:
        BoundServer(make_app(scorer, token), bound, ready).serve_forever()


def _models(config: Config) -> tuple[CheckModel, MakeModel]:
    """How to look at and to load reward models; here and not above, since this is what takes seconds to import."""
    from rlhf_dist.models.run_model import check_run_model
    from rlhf_dist.planning.placement import local_machine
    from rlhf_dist.scoring.reward_model import ModelSetting, RewardModel, reward_source

    setting = ModelSetting(
        policy="",
        max_tokens=0,
        chat=config.data.chat,
        model=config.model,
        device="cuda" if config.cluster.device != "cpu" and local_machine().gpus else "cpu",
        cache=Path(config.output).absolute() / ".models",
    )

    def look(name: str, spec: RewardSpec) -> object:
        check_run_model(spec.path, f"scoring.rewards.{name}.path")
        return reward_source(name, spec, setting)

    return (
        look,
        lambda name, spec: RewardModel(name, spec, config.scoring, setting),
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number up to 65535")
    return int(text)
