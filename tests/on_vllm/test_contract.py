"""What we rely on in vLLM 0.32, one fact a test.

The engine suite shows that all of it works together; these tests say which piece of vLLM has changed once it does not.
Each docstring names the place of ours to look at, below `server/nightschool_server/engines/`, and is printed with a
failure. These look at the installed package; `test_contract_engine.py` has those that need an engine.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm.envs
from nightschool_server.engines.model_folder import read_model_folder
from nightschool_server.engines.on_vllm import answers, core, plugin, support
from nightschool_server.engines.on_vllm.core import VLLMEngineConfig
from nightschool_server.engines.on_vllm.platform import GroupedCpuPlatform
from nightschool_server.engines.on_vllm.weights import read_weight, write_weight
from vllm import plugins
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.models.registry import ModelRegistry
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import resolve_current_platform_cls_qualname
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.engine import FINISH_REASON_STRINGS
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.request import Request

from tests.server.tiny_models import make_idefics3, make_qwen2


def parameters(function: Any) -> list[str]:
    """Names of a callable's parameters, `self` left out."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def lora(number: int, name: str = "", path: str = "nowhere") -> LoRARequest:
    return LoRARequest(lora_name=name or str(number), lora_int_id=number, lora_path=path)


@pytest.mark.parametrize("make", [make_qwen2, make_idefics3])
@pytest.mark.parametrize("is_cpu", [True, False])
def test_every_argument_of_ours_is_one_of_the_engine(make: Any, is_cpu: bool, tmp_path: Path) -> None:
    """on_vllm/core.py: engine_arguments."""
    config = VLLMEngineConfig(model="x", sleep=True, cache_bytes=1)
    folder = read_model_folder(str(make(tmp_path / "model")), context_length=0, max_lora_rank=64)
    known = {field.name for field in fields(AsyncEngineArgs)}
    assert set(core.engine_arguments(config, folder, is_cpu=is_cpu)) - known == set()


def test_ranks_are_those_that_vllm_has_slots_for() -> None:
    """on_vllm/core.py: RANKS."""
    assert get_args(MaxLoRARanks) == core.RANKS


def test_the_environment_is_read_under_these_names() -> None:
    """on_vllm/core.py: _prepare_environment."""
    known = vllm.envs.environment_variables
    assert {"VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"} <= set(known)


def test_the_engine_is_asked_under_these_names() -> None:
    """vllm_engine.py: _stream; on_vllm/life.py: CoreLife, call; on_vllm/core.py: start_core."""
    assert parameters(AsyncLLM.from_engine_args)[0] == "engine_args"
    asked = parameters(AsyncLLM.generate)
    assert (asked[:3], {"lora_request", "priority"} - set(asked)) == (
        ["prompt", "sampling_params", "request_id"],
        set(),
    )
    assert {"method", "args"} <= set(parameters(AsyncLLM.collective_rpc))
    assert isinstance(AsyncLLM.errored, property)


def test_the_death_of_the_engine_has_a_type_of_its_own() -> None:
    """vllm_engine.py: _stream; on_vllm/life.py: call; on_vllm/mixed_test.py: check_mixed_batches."""
    assert issubclass(EngineDeadError, Exception)
    assert not issubclass(VLLMValidationError, EngineDeadError)


def test_sampling_has_these_names() -> None:
    """on_vllm/answers.py: sampling_params; vllm_engine.py: score; on_vllm/mixed_test.py: _run."""
    ours = {"n", "temperature", "top_p", "top_k", "seed", "stop", "max_tokens", "logprobs", "ignore_eos", "output_kind"}
    ours |= {"skip_special_tokens", "prompt_logprobs", "detokenize"}
    assert ours - set(parameters(SamplingParams)) == set()
    assert {"DELTA", "FINAL_ONLY"} <= set(RequestOutputKind.__members__)


def test_a_temperature_above_2_is_refused_with_its_name() -> None:
    """on_vllm/answers.py: sampling_params, which hands the name on."""
    SamplingParams(temperature=2.0)
    with pytest.raises(VLLMValidationError, match="temperature") as caught:
        SamplingParams(temperature=2.01)
    assert caught.value.parameter == "temperature"


def test_several_greedy_samples_are_refused() -> None:
    """vllm_engine.py: generate, which asks for one and gives it n times; once this passes it need not."""
    with pytest.raises(VLLMValidationError, match="greedy"):
        SamplingParams(n=2, temperature=0.0)


def test_an_answer_ends_for_one_of_these_reasons() -> None:
    """on_vllm/answers.py: _FINISH, in which the other two are "cancelled"."""
    assert (*answers._FINISH, "error", "repetition") == FINISH_REASON_STRINGS


def test_outputs_have_these_names() -> None:
    """on_vllm/answers.py: Answers; vllm_engine.py: generate, score."""
    completion = {"index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason"}
    assert completion <= {field.name for field in fields(CompletionOutput)}
    assert {"outputs", "prompt_logprobs", "num_cached_tokens"} <= set(parameters(RequestOutput))
    assert {"logprob", "rank"} <= set(parameters(Logprob))


def test_lora_requests_are_equal_by_their_name_alone() -> None:
    """vllm_engine.py: _stream, whose names are therefore numbers; on_vllm/worker.py: set_active_adapters, their set."""
    assert lora(2, "one") == lora(3, "one")
    assert len({lora(2), lora(3), lora(3, path="elsewhere")}) == 2


def test_a_lora_request_needs_a_number_from_1_on_and_a_path() -> None:
    """on_vllm/worker.py: BASE_NUMBER; vllm_engine.py: the base model's folder."""
    with pytest.raises(ValueError, match="id must be"):
        lora(0)
    with pytest.raises(AssertionError, match="lora_path"):
        LoRARequest(lora_name="2", lora_int_id=2)


def test_the_prefix_cache_goes_by_the_name_and_path_of_the_adapter() -> None:
    """vllm_engine.py: _stream, which gives every adapter a name that no other one ever has."""

    def keys(request: LoRARequest | None) -> Any:
        asked: Any = SimpleNamespace(lora_request=request, mm_features=[], cache_salt=None, prompt_embeds=None)
        return generate_block_hash_extra_keys(asked, 0, 32, 0)[0]

    assert keys(None) is None
    assert len({keys(lora(2)), keys(lora(3)), keys(lora(2, path="elsewhere"))}) == 3
    assert keys(lora(2, "one")) == keys(lora(3, "one")), "not by the number"


def test_a_smaller_priority_goes_first() -> None:
    """vllm_engine.py: generate; engine.py: LIVE_PRIORITY, PRACTICE_PRIORITY."""

    def waiting(priority: int, arrival_time: float) -> Request:
        params = SamplingParams(max_tokens=1)
        return Request(f"{priority}", [1], params, None, arrival_time=arrival_time, priority=priority)

    assert waiting(0, arrival_time=2.0) < waiting(10, arrival_time=1.0)
    assert waiting(0, arrival_time=1.0) < waiting(0, arrival_time=2.0)


def test_the_manager_of_adapters_has_what_ours_overrides_and_calls() -> None:
    """on_vllm/worker.py: LaneManager."""
    stock = LRUCacheWorkerLoRAManager
    assert parameters(stock._load_adapter) == ["lora_request"]
    assert parameters(stock.set_active_adapters) == ["requests", "mapping"]
    assert parameters(stock.remove_adapter) == ["adapter_id"]
    assert parameters(stock.remove_all_adapters) == []
    assert parameters(LRUCacheLoRAModelManager.add_adapter) == ["lora"]
    assert parameters(LRUCacheLoRAModelManager.activate_adapter) == ["lora_id"]


def test_an_adapter_in_memory_is_made_of_these() -> None:
    """on_vllm/worker.py: _pair, _model, set_active_adapters."""
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    layer = LoRALayerWeights("module", 2, 4, a, b)
    assert (layer.rank, layer.scaling, layer.lora_a is a, layer.lora_b is b) == (2, 2.0, True, True)
    assert LoRALayerWeights("module", 2, 4, a, b, scaling=1).scaling == 1
    assert LoRAModel(7, 2, {"module": layer}).loras == {"module": layer}
    mapping = replace(LoRAMapping((1, 2), (1, 2), is_prefill=True), index_mapping=(0, 2))
    assert (mapping.index_mapping, mapping.prompt_mapping, mapping.is_prefill) == ((0, 2), (1, 2), True)


def test_the_operations_on_a_cpu_have_what_ours_override_and_call() -> None:
    """on_vllm/grouped.py: GroupedLoRA."""
    stock = PunicaWrapperCPU
    metadata = ["mapping", "lora_index_to_id", "max_loras", "vocab_size"]
    assert parameters(stock.update_metadata)[:4] == parameters(stock._update_base_metadata)[:4] == metadata
    linear = ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    assert parameters(stock.add_lora_linear)[:6] == linear
    assert parameters(stock)[:3] == ["max_num_batched_tokens", "max_batches", "device"]
    assert isinstance(stock.token_lora_indices, property)


def test_the_platform_names_what_is_called_to_make_the_operations() -> None:
    """on_vllm/platform.py: get_punica_wrapper, whose answer is a function of ours."""
    assert CpuPlatform.get_punica_wrapper().endswith(".PunicaWrapperCPU")
    assert "current_platform.get_punica_wrapper()" in inspect.getsource(get_punica_wrapper)


def test_our_plugins_are_found_in_the_groups_that_vllm_reads() -> None:
    """on_vllm/plugin.py and pyproject.toml: entry points."""
    found = {plugins.PLATFORM_PLUGINS_GROUP: plugin.platform, plugins.DEFAULT_PLUGINS_GROUP: plugin.guard}
    for group, ours in found.items():
        (entry,) = entry_points(group=group, name="nightschool")
        assert entry.load() is ours


def test_our_platform_is_taken_where_a_server_of_ours_started_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """on_vllm/plugin.py: platform, _PLAIN_CPU."""
    monkeypatch.delenv(plugin.SERVER_PID_VARIABLE, raising=False)
    assert resolve_current_platform_cls_qualname() == plugin._PLAIN_CPU
    monkeypatch.setenv(plugin.SERVER_PID_VARIABLE, "1")
    ours = f"{GroupedCpuPlatform.__module__}.{GroupedCpuPlatform.__name__}"
    assert resolve_current_platform_cls_qualname() == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_comes_back_bit_for_bit_and_is_replaced(dtype: torch.dtype) -> None:
    """on_vllm/weights.py: read_weight, write_weight."""
    first, second = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer: Any = torch.nn.Module()
    layer.weight, layer.input_size_per_partition = torch.nn.Parameter(first.clone(), requires_grad=False), 96
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    # bfloat16 is packed where the processor multiplies it (AVX-512) and kept as it is elsewhere; both come back.
    packed = layer.weight.numel() == 0
    assert packed or dtype is torch.bfloat16, "vLLM keeps the original: it need not be read through the kernel"
    assert torch.equal(read_weight(layer), first)
    write_weight(layer, second.clone())
    assert torch.equal(read_weight(layer), second)


def test_models_and_widths_that_we_count_on_are_known() -> None:
    """on_vllm/support.py: why_unsupported."""
    known = set(ModelRegistry.get_supported_archs())
    assert known >= {"Qwen2ForCausalLM", *support._KNOWS_IMAGES_WITHOUT_TORCHVISION}
    assert set(CPUAttentionBackend.get_supported_head_sizes()) >= support._CPU_HEAD_WIDTHS
