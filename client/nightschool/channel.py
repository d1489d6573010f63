"""How every channel of this client is set up; `blocking_transport.py` and `async_transport.py` open them."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 * 2**20
"""Both ways; the server's limit too."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # `retry.py` alone tries again.
    ("grpc.enable_retries", 0),
    # While a call is open only: a watch may be silent for minutes, and a dead peer must be noticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's default waits up to two minutes before it connects again; a restarted server should be found sooner.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
