"""TensorBoard as a sink: numbers, histograms and samples in event files, in TensorBoard's own records."""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.errors import ConfigError
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.sinks import NONE, FragileSink, SampleRow

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Raises ConfigError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "telemetry.tensorboard is true, but the package tensorboard is not installed: "
            "`pip install tensorboard==2.21.0`, or set it to false"
        )


class TensorBoardSink(FragileSink):
    """A folder with one file for each start of the run; after each call the record is in the file."""

    def __init__(self, folder: Path, on_failure: Callable[[str], None]) -> None:
        """Raises ConfigError as `require_tensorboard` does."""
        super().__init__("TensorBoard", on_failure)
        require_tensorboard()
        self._writer: Any = None
        self._first = True
        self._attempt(lambda: self._open(folder))

    def _open(self, folder: Path) -> None:
        # TensorBoard's own writer of events has a thread, whose error would be a traceback over the user's screen.
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(path.open("xb", buffering=0))
        self._write(wall_time=now, file_version="brain.Event:2")

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        def send() -> None:
            proto, _, _ = messages()
            values = [proto.Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
            values += [proto.Summary.Value(tag=name, histo=_histogram(found)) for name, found in histograms.items()]
            self._add(step, values)

        self._attempt(send)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """As text, one entry a response."""

        def send() -> None:
            from tensorboard.plugins.text import metadata
            from tensorboard.util import tensor_util

            proto, _, _ = messages()
            texts = [
                f"reward {row['reward']:.3g}\n\n    {_indented(row['prompt'])}\n\n    {_indented(row['response'])}"
                for row in rows
            ]
            tensor = tensor_util.make_tensor_proto([text.encode("utf-8", "backslashreplace") for text in texts])
            kind = metadata.create_summary_metadata(display_name="rollouts/samples", description="")
            self._add(step, [proto.Summary.Value(tag="rollouts/samples", metadata=kind, tensor=tensor)])

        if rows:
            self._attempt(send)

    def _add(self, step: int, values: list[Any]) -> None:
        summary_pb2, event_pb2, _ = messages()
        if self._first:
            # A resumed run goes back: what earlier files have from this step on is hidden then.
            self._first = False
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(wall_time=time.time(), step=step, session_log=start)
        self._write(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))

    def _write(self, **fields: Any) -> None:
        _, event_pb2, _ = messages()
        self._writer.write(event_pb2.Event(**fields).SerializeToString())

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)
        self._works = False


def messages() -> tuple[Any, Any, Any]:
    """TensorBoard's summary_pb2, event_pb2 and histogram_pb2, which say nothing of their types."""
    from tensorboard.compat.proto import event_pb2, histogram_pb2, summary_pb2

    return summary_pb2, event_pb2, histogram_pb2


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def _histogram(found: Histogram) -> Any:
    """TensorBoard wants moments, too: those of values in the middle of their buckets."""
    _, _, histogram_pb2 = messages()
    middles = [(low + high) / 2 for low, high in zip(found.edges, found.edges[1:], strict=False)]
    weighed = list(zip(middles, found.counts, strict=True))
    return histogram_pb2.HistogramProto(
        min=found.edges[0],
        max=found.edges[-1],
        num=sum(found.counts),
        sum=sum(middle * count for middle, count in weighed),
        sum_squares=sum(middle**2 * count for middle, count in weighed),
        bucket_limit=found.edges[1:],
        bucket=found.counts,
    )
