"""Sampling: a sample depends on its seed and its logits, and follows the distribution that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from nightschool_server.engine import BASE, Engine
from nightschool_server.engines.sampling import RowSampling, sample, uniform
from scipy import stats

from tests.server.engine_world import World, answer, answers, pictures, prompt_with, request
from tests.server.tiny_models import make_adapter, make_idefics3

VOCABULARY = 50
ROW = RowSampling(temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0)


def draws(logits: torch.Tensor, row: RowSampling, count: int) -> torch.Tensor:
    """`count` draws from one distribution, with seeds 0, 1, 2, ..."""
    return sample(logits.expand(count, -1), [replace(row, seed=seed) for seed in range(count)])


def random_logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_uniform_numbers_are_uniform_and_streams_are_independent() -> None:
    by_seed = uniform(list(range(20_000)), [3] * 20_000)
    by_position = uniform([11] * 20_000, list(range(20_000)))
    assert stats.kstest(by_seed, "uniform").pvalue > 0.01
    assert stats.kstest(by_position, "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(by_seed[:-1], by_seed[1:]).statistic) < 0.03
    assert abs(stats.pearsonr(by_seed, by_position).statistic) < 0.03
    assert uniform([-5, 2**64 - 5], [0, 0]).tolist() == [uniform([-5], [0])[0]] * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    logits, count = random_logits(1), 40_000
    found = draws(logits, replace(ROW, temperature=temperature), count).bincount(minlength=VOCABULARY)
    expected = (logits[0].double() / temperature).softmax(-1) * count
    large = expected > 5
    statistic = float(((found - expected)[large] ** 2 / expected[large]).sum())
    assert stats.chi2.sf(statistic, int(large.sum()) - 1) > 0.001


def test_top_k_and_top_p_keep_the_likeliest_and_nothing_else() -> None:
    logits = random_logits(2)
    order = logits[0].argsort(descending=True)
    probabilities = logits[0].softmax(-1)[order]
    kept = int((probabilities.cumsum(0) - probabilities < 0.6).sum())
    assert set(draws(logits, replace(ROW, top_k=3), 5_000).tolist()) == set(order[:3].tolist())
    assert set(draws(logits, replace(ROW, top_p=0.6), 20_000).tolist()) == set(order[:kept].tolist())
    assert set(draws(logits, replace(ROW, top_k=1, temperature=5.0), 100).tolist()) == {int(order[0])}
    assert set(draws(logits, replace(ROW, top_p=1e-6, temperature=5.0), 100).tolist()) == {int(order[0])}


def test_a_row_is_drawn_alike_whatever_shares_its_batch() -> None:
    logits = torch.cat([random_logits(seed) for seed in range(12)])
    rows = [
        RowSampling(temperature, top_k, top_p, seed=i, position=i % 3)
        for i, (temperature, top_k, top_p) in enumerate(
            [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 5, 1.0), (1.2, 0, 0.9), (0.7, 4, 0.5), (1.0, 0, 1.0)] * 2
        )
    ]
    together = sample(logits, rows).tolist()
    assert together == [int(sample(logits[i : i + 1], [rows[i]])[0]) for i in range(12)]
    assert sample(logits.flip(0), rows[::-1]).tolist() == together[::-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("sampling")
    folder = make_idefics3(home / "model")
    return World(folder, {"first": make_adapter(folder, home / "first", seed=1)})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Engine]:
    async with world.engine() as running:
        yield running


async def test_seeded_samples_are_the_same_alone_and_in_a_batch(engine: Engine) -> None:
    prompts = [prompt_with("How many apples?"), prompt_with("Which is red?", *pictures(1)), prompt_with("fox " * 20)]
    requests = [
        request(prompt, adapter, temperature=0.9, seed=seed, top_p=top_p, max_tokens=30)
        for prompt in prompts
        for adapter in (BASE, "first")
        for seed, top_p in ((1, 1.0), (2, 0.9))
    ]
    alone = [(await answer(engine, r)).token_ids for r in requests]
    together = [got.token_ids for got in await asyncio.gather(*(answer(engine, r) for r in requests))]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == len(requests)


async def test_sample_i_of_n_is_the_sample_of_seed_plus_i(engine: Engine) -> None:
    asked = request("Name three apples.", "first", temperature=1.0, seed=40, n=4)
    found = await answers(engine, asked)
    singles = [
        await answer(engine, request("Name three apples.", "first", temperature=1.0, seed=40 + i)) for i in range(4)
    ]
    assert [got.token_ids for got in found] == [got.token_ids for got in singles]


async def test_without_a_seed_every_request_draws_anew(engine: Engine) -> None:
    found = [await answer(engine, request("Hello", temperature=1.0)) for _ in range(3)]
    assert len({tuple(got.token_ids) for got in found}) == 3


async def test_logprobs_are_of_the_untempered_distribution(world: World, engine: Engine) -> None:
    hot = await answer(engine, request("Hello", temperature=2.0, seed=1, logprobs=True, top_logprobs=2))
    expected = world.reference.logprobs(request("Hello").prompt, hot.token_ids)
    assert hot.logprobs == pytest.approx([float(expected[i, t]) for i, t in enumerate(hot.token_ids)], abs=1e-4)
    assert all(len(tops) == 2 and tops[0].logprob >= tops[1].logprob for tops in hot.top_logprobs)
    plain = await answer(engine, request("Hello"))
    assert not plain.logprobs
    assert not plain.top_logprobs
