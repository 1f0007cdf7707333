"""`python -m rlhf_dist.cluster.join_probe ADDRESS SECONDS`: tries to join a cluster as a run would.

Its last line is JSON: `{"problem": ""}`, or what stands in the way. A process of its own, because Ray's calls cannot be
interrupted, print to the screen and sometimes end the process.
"""

from __future__ import annotations

import json
import sys

from rlhf_dist.cluster.address import greet, parse

NODE_LIMIT_S = 10


def problem(given: str, limit_s: float) -> str:
    """What stands in the way of joining the cluster at `given`; empty: nothing."""
    address = given
    if given == "auto":
        from ray._private import services

        try:
            address = services.canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            return "no Ray cluster runs on this machine (`ray start --head` starts one)"
    found = f"{address} " if address != given else ""
    host, port = parse(address)
    wrong = greet(host, port, limit_s)
    return f"{found}{wrong}" if wrong else found_by_ray(address, given, limit_s)


def found_by_ray(address: str, given: str, limit_s: float) -> str:
    """What Ray itself finds wrong with the cluster, or with its node on this machine."""
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError

    try:
        if given == "auto":
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        tokens.ensure_token_if_auth_enabled({}, create_token_if_missing=False)
        client = GcsClient(address=address)
        if not services.find_node_ids():
            return (
                "a cluster answers, but this machine is not one of its nodes; run the command on a node, "
                "as launch/submit.sh does"
            )
        node = services.get_node_to_connect_for_driver(client, timeout_seconds=min(NODE_LIMIT_S, int(limit_s) or 1))
    except AuthenticationError:
        return "the cluster rejects the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
    except Exception as error:  # Ray's own errors have many types, and no common one
        return f"a server answers, but joining fails: {' '.join(str(error).split())[:300]}"
    silent = greet(node.node_manager_address, node.node_manager_port, limit_s)
    return f"the cluster's node on this machine does not work: {silent}" if silent else ""


def main() -> None:
    """See the module."""
    print("\n" + json.dumps({"problem": problem(sys.argv[1], float(sys.argv[2]))}))


if __name__ == "__main__":
    main()
