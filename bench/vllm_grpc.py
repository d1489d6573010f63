"""vLLM's own gRPC server as a side of `bench/serving.py`: token ids in, token ids out, the base model alone.

`vllm.entrypoints.launchers.grpc_server` serves what `smg-grpc-servicer` brings. It knows no chat, no text and no
adapters, so the chat template and the tokenizer run in the client, within the request's time, and nobody turns the
tokens of an answer into text. A piece is a message that brings tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import AutoTokenizer

from bench import tree
from bench.load import Job, Trace, messages, run_streams, trace_of
from bench.process import START_S, Process
from bench.sides import Setting, flags, free_port, stub_distribution, vllm_arguments

PACKAGE = "smg_grpc_servicer"


class VLLMGrpc:
    """vLLM's gRPC server, asked over one channel. LoRA is switched on as elsewhere, but cannot be asked for."""

    has_adapter = False

    def __init__(self, setting: Setting) -> None:
        self.startup_s = 0.0
        self._setting = setting
        self._stub = tempfile.TemporaryDirectory(prefix="vllm-stub-")
        self._numbers = itertools.count()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(setting.model)
        self._messages: Any = import_module("smg_grpc_proto.generated.vllm_engine_pb2")
        self._process: Process
        self._channel: grpc.aio.Channel
        self._generate: Any

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--model", self._setting.model, "--enable-lora"]
        command += flags(vllm_arguments(self._setting.dtype))
        # Its plugin is to be in no other side's vLLM, so the packages may lie outside of the environment.
        folders = [stub_distribution(Path(self._stub.name)), _packages(), os.environ.get("PYTHONPATH", "")]
        self._process = Process(command, env={"PYTHONPATH": ":".join(map(str, folders))})
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        services: Any = import_module("smg_grpc_proto.generated.vllm_engine_pb2_grpc")
        self._generate = services.VllmEngineStub(self._channel).Generate
        ends = time.perf_counter() + START_S
        while not await self._is_healthy():
            self._process.check("health", ends)
            await asyncio.sleep(0.1)
        self.startup_s = time.perf_counter() - self._process.began
        if self._setting.pin:
            tree.pin_engine_core(self.pid)

    async def take(self, adapter: bool) -> None:
        assert not adapter, "it serves the base model alone"

    async def run(self, job: Job) -> list[Trace]:
        return await run_streams(job, lambda _, text: trace_of(self._pieces(text, job.tokens)))

    async def close(self) -> None:
        if hasattr(self, "_channel"):
            await self._channel.close()
        if hasattr(self, "_process"):
            await self._process.end()
        self._stub.cleanup()

    async def _pieces(self, text: str, tokens: int) -> AsyncIterator[tuple[str, int | None, int | None]]:
        prompt = self._tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, tokenize=False)
        found = self._messages
        request = found.GenerateRequest(
            request_id=f"bench-{next(self._numbers)}",
            tokenized=found.TokenizedInput(input_ids=self._tokenizer.encode(prompt, add_special_tokens=False)),
            sampling_params=found.SamplingParams(temperature=0.0, top_p=1.0, n=1, max_tokens=tokens, ignore_eos=True),
            stream=True,
        )
        count = 0
        async for response in self._generate(request):
            # The message that completes a stream counts the tokens of the last chunk alone.
            count += len(response.chunk.token_ids)
            yield "token" if response.chunk.token_ids else "", count, response.chunk.prompt_tokens

    async def _is_healthy(self) -> bool:
        try:
            found = await health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError:
            return False
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)


def is_installed() -> bool:
    """Whether the packages can be found, in the environment or on `sys.path`."""
    return find_spec(PACKAGE) is not None and find_spec("smg_grpc_proto") is not None


def _packages() -> Path:
    """The folder that has them."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]
