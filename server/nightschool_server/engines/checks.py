"""What every engine asks of a request before it takes it."""

from __future__ import annotations

from nightschool_server.engine import Sampling
from nightschool_server.errors import ContextOverflowError, InvalidRequestError


def check_sampling(sampling: Sampling) -> None:
    """Raise InvalidRequestError where a number is out of its range."""
    rules = (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("n", sampling.n >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < float("inf"), "a finite number of at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "at least 0"),
        ("top_logprobs", sampling.top_logprobs >= 0, "at least 0"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise InvalidRequestError(name, f"{name} is {getattr(sampling, name)}; it must be {rule}")


def check_length(num_prompt: int, num_following: int, context: int) -> None:
    """Raise ContextOverflowError where a prompt and what follows it exceed the context, in tokens."""
    if num_prompt >= context:
        raise ContextOverflowError(
            "messages", f"the prompt has {num_prompt} tokens; the context holds {context}: shorten the prompt"
        )
    if num_prompt + num_following > context:
        raise ContextOverflowError(
            "max_tokens",
            f"the prompt's {num_prompt} tokens and max_tokens {num_following} make {num_prompt + num_following}; "
            f"the context holds {context}: ask for at most {context - num_prompt}",
        )
