"""Prometheus metrics: the endpoint, and what every process reports of itself.

CPU, memory, open files and start time come from prometheus_client's own collector. `tidegate_ready` is 1 from the moment
a process does its work; whoever started it waits for that.

```python
port = metrics.serve("127.0.0.1", 0)
metrics.mark_ready("worker")
```
"""

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import Gauge, Info, start_http_server

READY = Gauge("tidegate_ready", "1 when the process does its work, 0 while it starts or stops.", ["process"])
_BUILD = Info("tidegate_build", "Version of Tidegate.")


def serve(host: str, port: int) -> int:
    """Serve `/metrics` on a thread of its own and return the port; 0 picks a free one. Raises OSError when it is taken."""
    try:
        _BUILD.info({"version": version("tidegate")})
    except PackageNotFoundError:
        _BUILD.info({"version": "unknown"})
    server, _thread = start_http_server(port, addr=host)
    return int(server.server_port)


def mark_ready(process: str, ready: bool = True) -> None:
    """Say that this process does its work now, or (False) that it stops."""
    READY.labels(process).set(1 if ready else 0)
