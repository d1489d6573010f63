"""Whether the vLLM that is installed can serve a model, asked without starting it."""

from __future__ import annotations

from nightschool_server.engines.model_folder import read_model_folder
from nightschool_server.errors import ModelFormatError

_KNOWS_IMAGES_WITHOUT_TORCHVISION = frozenset(
    {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration", "PaliGemmaForConditionalGeneration"}
)
_CPU_HEAD_WIDTHS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256})
"""Widths of an attention head that the CPU build's kernel has."""


def why_unsupported(model: str) -> str:
    """Why vLLM cannot serve the model here, in a few words; empty where it can, or where no engine can read it."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    try:
        folder = read_model_folder(model, context_length=0, max_lora_rank=1, with_digest=False)
    except ModelFormatError:
        # Whichever engine is taken says what is wrong, better than a reason for not taking the other.
        return ""
    architecture = (getattr(folder.config, "architectures", None) or ["unknown"])[0]
    if architecture not in ModelRegistry.get_supported_archs():
        return f"vllm_has_no_{architecture}"
    text = folder.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if current_platform.is_cpu() and width not in _CPU_HEAD_WIDTHS:
        return f"vllm_on_cpu_has_no_heads_of_width_{width}"
    if folder.sees and architecture not in _KNOWS_IMAGES_WITHOUT_TORCHVISION and not _has_torchvision():
        return f"{architecture}_needs_torchvision"
    return ""


def _has_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except Exception:
        # A build for another device fails in its own ways when it loads its libraries.
        return False
    return True
