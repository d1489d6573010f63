"""Sampling parameters off the wire: bounds, defaults, and one sentence for each that is broken."""

from __future__ import annotations

import math

from nightschool_proto.v1 import content_pb2

from nightschool_server.engine import Sampling
from nightschool_server.errors import InvalidRequestError

MAX_TEMPERATURE = 5.0
MAX_N = 64
MAX_STOP_STRINGS = 8
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1 - MAX_N
"""Sample i draws from the stream of seed + i, which must stay a signed 64-bit number."""

DEFAULTS = Sampling()


def sampling_of(sampling: content_pb2.Sampling, defaults: Sampling = DEFAULTS) -> Sampling:
    """The sampling parameters; absent ones take the defaults.

    Raises InvalidRequestError with the field, its value, the rule and the remedy.
    """
    return Sampling(
        max_tokens=_max_tokens(sampling, defaults),
        temperature=_temperature(sampling, defaults),
        top_p=_top_p(sampling, defaults),
        top_k=_top_k(sampling, defaults),
        seed=_seed(sampling),
        stop=_stop(sampling),
        n=_n(sampling, defaults),
        logprobs=sampling.logprobs,
        top_logprobs=_top_logprobs(sampling),
        ignore_eos=sampling.ignore_eos,
        special_tokens=defaults.special_tokens,
    )


def _max_tokens(sampling: content_pb2.Sampling, defaults: Sampling) -> int:
    if not sampling.HasField("max_tokens"):
        return defaults.max_tokens
    value = sampling.max_tokens
    if value < 1:
        default = defaults.max_tokens
        raise _error("max_tokens", value, f"must be at least 1: raise it or leave it out for {default}")
    return value


def _temperature(sampling: content_pb2.Sampling, defaults: Sampling) -> float:
    if not sampling.HasField("temperature"):
        return defaults.temperature
    value = _float(sampling.temperature)
    if not 0 <= value <= MAX_TEMPERATURE:
        raise _error("temperature", value, f"must lie between 0 and {MAX_TEMPERATURE:g}: 0 is greedy, 1 is plain")
    return value


def _top_p(sampling: content_pb2.Sampling, defaults: Sampling) -> float:
    if not sampling.HasField("top_p"):
        return defaults.top_p
    value = _float(sampling.top_p)
    if not 0 < value <= 1:
        raise _error("top_p", value, "must be above 0 and at most 1: 1 keeps every token")
    return value


def _top_k(sampling: content_pb2.Sampling, defaults: Sampling) -> int:
    if sampling.top_k < 0:
        raise _error("top_k", sampling.top_k, "must be at least 0: 0 keeps every token")
    return sampling.top_k if sampling.HasField("top_k") else defaults.top_k


def _seed(sampling: content_pb2.Sampling) -> int | None:
    if not sampling.HasField("seed"):
        return None
    if not 0 <= sampling.seed <= MAX_SEED:
        raise _error("seed", sampling.seed, f"must lie between 0 and {MAX_SEED}: leave it out to draw afresh")
    return sampling.seed


def _n(sampling: content_pb2.Sampling, defaults: Sampling) -> int:
    if not sampling.HasField("n"):
        return defaults.n
    if not 1 <= sampling.n <= MAX_N:
        raise _error("n", sampling.n, f"must lie between 1 and {MAX_N}: send another request for more answers")
    return sampling.n


def _stop(sampling: content_pb2.Sampling) -> tuple[str, ...]:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise _error("stop", f"{len(sampling.stop)} strings", f"at most {MAX_STOP_STRINGS} are taken")
    for index, text in enumerate(sampling.stop):
        if not text:
            raise _error(f"stop[{index}]", "empty", "an empty string would stop at once: leave it out")
        if len(text) > MAX_STOP_CHARS:
            raise _error(f"stop[{index}]", f"{len(text)} characters", f"may have at most {MAX_STOP_CHARS}")
    return tuple(sampling.stop)


def _top_logprobs(sampling: content_pb2.Sampling) -> int:
    value = sampling.top_logprobs
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise _error("top_logprobs", value, f"must lie between 0 and {MAX_TOP_LOGPROBS}")
    if value and not sampling.logprobs:
        raise _error("top_logprobs", value, "needs sampling.logprobs: set it too")
    return value


def _float(value: float) -> float:
    """A 32-bit float as its shortest decimal, so that 0.7 stays 0.7; NaN fails every bound."""
    return value if math.isnan(value) or math.isinf(value) else float(f"{value:.7g}")


def _error(name: str, value: object, rule: str) -> InvalidRequestError:
    shown = f"{value:g}" if isinstance(value, float) else value
    return InvalidRequestError(f"sampling.{name}", f"sampling.{name} is {shown}, but {rule}")
