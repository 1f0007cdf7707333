"""Prometheus as a sink: the last step's numbers on a port of this machine, for whoever scrapes it."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_dist.errors import ConfigError
from rlhf_dist.telemetry.alerts import TITLES, AlertKind
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.sinks import NONE, Sink

HOST = "127.0.0.1"
"""Loopback: nothing that has no token is reached from another machine."""


def require_port(port: int) -> None:
    """Raises ConfigError where something else listens there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except OSError as error:
        raise _not_usable(port, error) from None


def _not_usable(port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"telemetry.prometheus_port is {port}, which cannot be used on {HOST} ({error.strerror}); choose another one, "
        "or 0 for no metrics on a port"
    )


def exported(metric: str) -> str:
    """`reward/mean` -> `rlhf_reward_mean`."""
    return "rlhf_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


class PrometheusSink(Sink):
    """Answers at http://127.0.0.1:PORT/metrics in a thread of its own."""

    def __init__(self, port: int, run: str) -> None:
        """`run`: the label of every number. Raises ConfigError where the port is not free."""
        from prometheus_client import CollectorRegistry, start_http_server

        self._run = run
        self._values: dict[str, float] = {}
        self._alerts: Counter[AlertKind] = Counter()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=HOST, registry=registry)
        except OSError as error:
            raise _not_usable(port, error) from None

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks a collector for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, value in dict(self._values).items():
            gauge = GaugeMetricFamily(exported(name), f"{name}, see docs/metrics.md", labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge
        alerts = CounterMetricFamily("rlhf_alerts", "Alerts of this start of the run", labels=["run", "kind"])
        for kind in TITLES:
            alerts.add_metric([self._run, kind], self._alerts[kind])
        yield alerts

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        """Numbers that a step lacks stay as they were: an evaluation's, say."""
        now = {"step": float(step), "step_logged_timestamp_seconds": time.time()}
        self._values = self._values | {name: float(value) for name, value in metrics.items()} | now

    def alert(self, kind: AlertKind, text: str, subject: str) -> None:
        self._alerts[kind] += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
