"""vLLM's CPU platform with one answer changed: which LoRA operations to use."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class GroupedCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """A CPU whose LoRA is right in mixed batches."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The LoRA operations, as vLLM resolves them: what is called gives the wrapper."""
        return "nightschool_server.engines.on_vllm.grouped.make_lora_operations"
