"""Settings of serving: the server, the engine, the request log, sessions, adapters and the agent loop.

`config.py` puts them together with the learner's (`learner.py`). Every field is documented once, under it.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nightschool_server.config.code import CodeConfig

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
MIB = 1024 * 1024


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerConfig(_Section):
    """The gRPC port and what every call is held to."""

    host: str = "127.0.0.1"
    """Address to listen on. One that is not loopback needs TLS, or `allow_insecure`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """Port to listen on. 0: any free one."""
    tls_cert: str = ""
    """File with the certificate chain, PEM. Empty: no TLS."""
    tls_key: str = ""
    """File with the private key, PEM."""
    allow_insecure: bool = False
    """Listen beyond this machine without TLS: tokens and prompts travel in the clear."""
    max_message_bytes: Annotated[int, Field(ge=1024, le=1024 * MIB)] = 64 * MIB
    """Largest request and reply, bytes."""
    max_concurrent_requests: Positive = 256
    """Calls in flight; live, practice and admin calls are counted apart."""
    default_deadline_s: Seconds = 120.0
    """Of a call that sets none, seconds."""
    max_deadline_s: Seconds = 600.0
    """Longer deadlines are cut to this, seconds."""
    drain_s: Annotated[float, Field(ge=0)] = 20.0
    """How long calls in flight may take after SIGTERM, seconds."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key belong together: set both or neither")
        if not (is_loopback(self.host) or self.tls_cert or self.allow_insecure):
            raise ValueError(
                f"host {self.host!r} is reachable from other machines: set tls_cert and tls_key, "
                "or allow_insecure = true if the network is trusted"
            )
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError(
                f"default_deadline_s {self.default_deadline_s:g} is above max_deadline_s {self.max_deadline_s:g}"
            )
        return self


class EngineConfig(_Section):
    """What runs the model, and how much of it at once."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """Which engine. `auto`: vLLM where it is installed and knows the model's architecture, transformers otherwise."""
    model: str = ""
    """Folder or hub id of the base model. Empty: the application's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. `auto`: bfloat16 on CUDA, float32 elsewhere."""
    num_slots: Positive = 32
    """Answers that are decoded in one step."""
    num_retained_slots: Annotated[int, Field(ge=0)] = 8
    """Further slots that only keep finished prefixes for reuse."""
    context_length: Annotated[int, Field(ge=0)] = 0
    """Tokens of prompt and answer together. 0: the model's."""
    max_lora_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """An adapter of higher rank is refused."""
    max_loras: Positive = 4
    """vLLM: different adapters in one step; requests on more of them take turns."""
    max_cpu_loras: Annotated[int, Field(ge=2)] = 16
    """vLLM: adapters that the engine keeps, the base model counted; one more is refused."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """vLLM: of a GPU's memory, for weights and cache together."""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """vLLM: for keys and values. 0: what the slots need on a CPU, what is left of `memory_fraction` on a GPU."""
    pin_cores: bool = True
    """vLLM: on a CPU of up to 4 cores, keep its scheduler on the worker's core, so that the server has one."""
    self_test: bool = True
    """vLLM: prove at start that a batch of several adapters is answered rightly."""
    prefill_chunk_tokens: Annotated[int, Field(ge=16)] = 512
    """Prompt tokens that one step takes in, so that a long prompt does not hold up those that decode."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads. 0: all cores but one."""
    max_waiting: Positive = 1024
    """Answers that may wait for a slot, live and practice counted apart; one more is refused."""
    max_practice_rows_with_live: Positive = 4
    """Tokens of practice, decoded or prefilled, in a step with a live request; four times as many in one between two
    live requests. Fewer favours live latency. vLLM: practice has half the slots instead."""
    live_linger_ms: Annotated[float, Field(ge=0)] = 500.0
    """A step is between two live requests until so long after the last one; until twenty times as long practice
    prefills a little a step, then it takes all it can. vLLM: of no effect."""
    merged_lane: bool = True
    """Serve the active adapter merged into the weights, at the base model's speed; costs one more copy of the
    weights that it changes."""


class LogConfig(_Section):
    """What is kept of requests."""

    default_policy: Literal["train", "log_only", "no_log"] = "train"
    """Of a request that names none."""
    queue_size: Positive = 1000
    """Requests that wait to be written; beyond it log lines are dropped and counted, never requests."""
    redact: bool = True
    """Replace e-mail addresses, card numbers and credentials in logged text by placeholders."""
    max_images_per_request: Annotated[int, Field(ge=0)] = 16
    """More images in one request are refused."""
    max_image_bytes: Positive = 20 * MIB
    """A larger encoded image is refused, bytes."""
    max_image_pixels: Positive = 50_000_000
    """An image of more pixels is refused before it is decoded."""


class SessionsConfig(_Section):
    """How long requests of one session keep their adapter."""

    idle_timeout_s: Seconds = 1800.0
    """A session ends when nothing came for so long, seconds."""
    max_sessions: Positive = 10_000
    """Beyond it the one that idled longest ends."""


class AdaptersConfig(_Section):
    """Which adapters stay loaded, and the proof that a loaded one works."""

    max_loaded: Annotated[int, Field(ge=2)] = 8
    """Adapters in the engine at once; those that nobody uses leave first."""
    max_folder_bytes: Positive = 4096 * MIB
    """A larger adapter is refused, bytes."""
    min_probe_effect_nats: Annotated[float, Field(ge=0)] = 1e-4
    """The largest change of a probe token's logprob against the base must exceed this."""
    max_probe_error_nats: Annotated[float, Field(gt=0)] = 0.05
    """How far a probe token's logprob may lie from the trainer's recorded one, mean over the probe."""


class AgentConfig(_Section):
    """The agent loop of RunTask and its tools."""

    app: str = ""
    """The application as `module:attribute`. Empty: no tools of the server's own."""
    action_format: Literal["tool_calls", "code"] = "tool_calls"
    """How the model writes actions: calls of tools, or Python that may call them and runs in a sandbox."""
    unsafe_code: bool = False
    """Run code without a sandbox, with every right of the server's user, where bubblewrap cannot be had."""
    code: CodeConfig = CodeConfig()
    max_steps: Positive = 8
    """Model calls of one task."""
    max_tokens: Positive = 256
    """Of one step."""
    max_malformed_steps: Positive = 3
    """So many in a row that cannot be read end a task."""
    max_task_tokens: Positive = 4096
    """Of all steps of one task."""
    max_task_s: Seconds = 120.0
    """Wall time of one task, seconds."""
    tool_call_format: Literal["auto", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"] = "auto"
    """How the model writes tool calls. `auto`: as its chat template does, hermes where that does not show."""
    temperature: Annotated[float, Field(ge=0, le=4)] = 0.0
    """Of a task that names none. 0 is greedy."""
    max_calls: Positive = 16
    """Tool calls in one step; a step with more runs none of them."""
    max_parallel_calls: Positive = 4
    """Calls of one step that run side by side, where their tools are read_only. 1: all in their order."""
    tool_timeout_s: Seconds = 30.0
    """Of one tool call, where neither the tool nor its application says otherwise, seconds; then it is killed."""
    max_tool_s: Seconds = 60.0
    """Of all tool calls of one task together, seconds; no call may take more than what is left."""
    client_tool_timeout_s: Seconds = 60.0
    """How long a client may take to answer one call of its tools, seconds."""
    num_tool_workers: Positive = 2
    """Processes that run tools."""
    max_output_chars: Positive = 4000
    """A tool's output is cut to this."""
    max_tool_memory_bytes: Annotated[int, Field(ge=0)] = 2048 * MIB
    """Memory that a call may take, in each of its processes, beside what its worker has (Linux). 0: no limit."""
    max_files: Annotated[int, Field(ge=0)] = 16
    """Files that one task may bring, and that one call of a tool may give back."""
    max_file_bytes: Positive = 256 * MIB
    """A larger file is refused, bytes; also one that a tool gives back."""
    max_files_bytes: Positive = 512 * MIB
    """Of all files that one task brings, bytes."""
    keep_uploads_s: Seconds = 86_400.0
    """An upload, and a file that a tool gave back, can be named and fetched for so long, seconds; those that a logged
    request names stay as long as its row."""
    max_held_bytes: Positive = 4096 * MIB
    """Of all that one caller has uploaded in that time, bytes."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
