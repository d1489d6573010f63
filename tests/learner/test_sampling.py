"""Sampling and the served critic against a real server with the real tiny model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool import AsyncClient, LearningPolicy
from nightschool_learner.critics import Judge
from nightschool_learner.critique import Context
from nightschool_learner.prompts import CandidateView
from nightschool_learner.roles import Model
from nightschool_learner.sampling import AdapterSampler, PracticeSampler
from nightschool_learner.stages import Cycle
from nightschool_server.chat import user
from nightschool_server.config.roles import CriticConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError, InvalidRequestError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from examples.shop.traffic import traffic
from tests.harness import Running
from tests.learner.practice_app import app
from tests.learner.practice_home import cycle_on, open_home

HOT = Sampling(max_tokens=8, temperature=4.0, n=4, seed=11)
"""Hot enough that another seed gives other tokens, however sure the model is."""
PROMPT = Prompt((user("What does one mug cost?"),), app.specs)


@pytest.fixture
async def cycle(shop_server: Running, tmp_path: Path) -> AsyncIterator[Cycle]:
    """A cycle on a home of its own whose client is connected with the shop's server."""
    token = (shop_server.home / "cli.token").read_text().strip()
    async with AsyncClient(shop_server.address, token=token) as client:
        yield replace(cycle_on(open_home(tmp_path)), client=client)


async def test_a_call_gives_n_answers_with_their_tokens_and_the_same_ones_again(cycle: Cycle) -> None:
    sampler = PracticeSampler(cycle)
    first = await sampler.sample(PROMPT, HOT, adapter="base")
    assert len(first.answers) == 4
    assert all(len(answer.token_ids) == len(answer.logprobs) > 0 for answer in first.answers)
    assert all(answer.logprob < 0 for answer in first.answers)
    assert first.num_prompt_tokens > 0
    again, other = await asyncio.gather(
        sampler.sample(PROMPT, HOT, adapter="base"),
        sampler.sample(PROMPT, replace(HOT, seed=99), adapter="base"),
    )
    assert [answer.token_ids for answer in again.answers] == [answer.token_ids for answer in first.answers]
    assert [answer.token_ids for answer in other.answers] != [answer.token_ids for answer in first.answers]


async def test_an_answer_cut_by_its_limit_says_so(cycle: Cycle) -> None:
    samples = await PracticeSampler(cycle).sample(PROMPT, Sampling(max_tokens=1, temperature=0), adapter="base")
    assert samples.answers[0].finish_reason == "length"


async def test_what_the_learner_samples_is_never_in_the_log(cycle: Cycle, shop_server: Running) -> None:
    marked = Prompt((user("The learner asks itself about zebras"),))
    await PracticeSampler(cycle).sample(marked, HOT, adapter="base")
    reply = await cycle.client.generate("A caller asks about zebras", max_tokens=1, learning=LearningPolicy.TRAIN)
    await cycle.client.feedback(reply.response_id, good=True)  # the log has been written when this returns
    with_store = Store.open(Home(shop_server.home), migrate=False)
    texts = [row["parts"] for row in with_store.query("SELECT parts FROM messages WHERE parts LIKE '%zebras%'")]
    with_store.close()
    assert len(texts) == 1
    assert "A caller asks" in texts[0]


async def test_a_picture_goes_by_its_bytes_or_by_its_hash(cycle: Cycle) -> None:
    picture = next(request.images[0] for request in traffic(seed=1) if request.images)
    sha256 = hashlib.sha256(picture).hexdigest()
    messages = (user("What is it?", [sha256]),)
    sampler, greedy = PracticeSampler(cycle), Sampling(max_tokens=4, temperature=0)
    by_bytes = await sampler.sample(Prompt(messages, images={sha256: picture}), greedy, adapter="base")
    # A picture that practice brings is not kept; that of a logged request is, and goes by its hash from then on.
    reply = await cycle.client.generate("What is it?", images=[picture], max_tokens=1, learning=LearningPolicy.TRAIN)
    await cycle.client.feedback(reply.response_id, good=True)
    by_hash = await sampler.sample(Prompt(messages), greedy, adapter="base")
    assert by_hash.answers[0].token_ids == by_bytes.answers[0].token_ids
    without = await sampler.sample(Prompt((user("What is it?"),)), greedy, adapter="base")
    assert by_hash.num_prompt_tokens == by_bytes.num_prompt_tokens > without.num_prompt_tokens


async def test_what_the_engine_refuses_is_the_agent_loop_s_own_error(cycle: Cycle) -> None:
    sampler = PracticeSampler(cycle)
    with pytest.raises(ContextOverflowError):
        await sampler.sample(Prompt((user("word " * 20_000),)), HOT, adapter="base")
    with pytest.raises(InvalidRequestError):
        await sampler.sample(Prompt((user("?", ["f" * 64]),)), HOT, adapter="base")


async def test_the_agent_loop_samples_through_the_same_door(cycle: Cycle) -> None:
    sampler = PracticeSampler(cycle)
    greedy = Sampling(max_tokens=8, temperature=0)
    [delta] = [delta async for delta in AdapterSampler(sampler, "base").sample(PROMPT, greedy)]
    [answer] = (await sampler.sample(PROMPT, greedy, adapter="base")).answers
    assert (delta.text, delta.token_ids, delta.finish_reason) == (answer.text, answer.token_ids, answer.finish_reason)


async def test_the_served_critic_reads_its_margin_from_the_odds(cycle: Cycle) -> None:
    critic = Judge(Model(PracticeSampler(cycle), "base", "served/base", True, True), CriticConfig(max_chars=10**6))
    context = Context("What does one mug cost?", (), ())
    good, bad = CandidateView("12", ""), CandidateView("nothing at all", "")
    verdicts = [await critic.compare(context, good, bad), await critic.compare(context, good, bad)]
    assert verdicts[0].winner == verdicts[1].winner
    assert verdicts[0].margin_nats == pytest.approx(verdicts[1].margin_nats, abs=1e-4)
    assert verdicts[0].winner in ("first", "second")
    assert verdicts[0].won_by_nats >= 0
    assert verdicts[0].prompt_tokens > 20


async def test_a_critic_s_prompt_that_does_not_fit_is_no_verdict(cycle: Cycle) -> None:
    critic = Judge(Model(PracticeSampler(cycle), "base", "served/base", True, True), CriticConfig(max_chars=10**6))
    view = CandidateView("word " * 20_000, "")
    assert (await critic.compare(Context("task", (), ()), view, view)).winner == "invalid"


async def test_the_engine_says_how_long_it_has_worked_and_a_server_that_is_away_says_nothing(cycle: Cycle) -> None:
    sampler = PracticeSampler(cycle)
    before = await sampler.engine_busy_s()
    await sampler.sample(PROMPT, HOT, adapter="base")
    after = await sampler.engine_busy_s()
    assert before is not None
    assert after is not None
    assert after > before
    async with AsyncClient("127.0.0.1:1", token="none") as away:
        assert await PracticeSampler(replace(cycle, client=away)).engine_busy_s() is None
