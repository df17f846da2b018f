"""What a client of the gateway sees when a server dies under its request."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.system import wait_until
from tests.gateway.fleet import Fleet, ask, kill, same

SENTENCE = "what stands here is known to one server, which is asked for whatever goes on from it"


@pytest.fixture
def mortal_fleet(fleet: Fleet) -> Iterator[Fleet]:
    """A fleet whose servers may be killed; they are back after the test."""
    yield fleet
    fleet.wait_whole()


def test_when_a_server_dies_the_other_answers_what_had_no_token_and_a_stream_that_had_some_ends_with_an_error(
    mortal_fleet: Fleet,
):
    victim, survivor = mortal_fleet.replicas
    ask(victim, SENTENCE)  # so that all requests go there
    begun = mortal_fleet.complete(f"{SENTENCE} 0", 4_000, stream=True)
    next(begun)
    os.kill(victim.pids()["executor_service.rank"], signal.SIGSTOP)  # no further token comes
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(mortal_fleet.complete, f"{SENTENCE} 1")
        streamed = pool.submit(lambda: list(mortal_fleet.complete(f"{SENTENCE} 2", stream=True)))
        wait_until(lambda: victim.load().running_requests + victim.load().waiting_requests == 3)
        kill(victim)
        assert same(plain.result().choices[0].text, ask(survivor, f"{SENTENCE} 1").text)
        text = "".join(chunk.choices[0].text for chunk in streamed.result())
        assert same(text, ask(survivor, f"{SENTENCE} 2").text)
    with pytest.raises(openai.APIError):
        list(begun)


def test_a_stream_whose_executor_dies_pauses_and_goes_on_with_the_next_token(mortal_fleet: Fleet):
    victim, _ = mortal_fleet.replicas
    ask(victim, f"{SENTENCE}, again")
    undisturbed = [chunk.choices[0].text for chunk in mortal_fleet.complete(f"{SENTENCE}, again", 400, stream=True)]
    epoch = victim.client.server().epoch
    stream = mortal_fleet.complete(f"{SENTENCE}, again", 400, stream=True)
    texts = [next(stream).choices[0].text]
    os.kill(victim.pids()["executor_service.rank"], signal.SIGKILL)
    texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == "".join(undisturbed)
    assert victim.client.server().epoch == epoch + 1
