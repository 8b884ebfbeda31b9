"""Requests to an OpenAI-compatible endpoint: tried again where that may help, counted, and asked
once only."""

from __future__ import annotations

import asyncio
import os
import random
import re
from dataclasses import dataclass
from typing import Any

import httpx

from megalite.errors import ConfigError, Unreachable
from megalite.synthesize.answers import Answer, Answers, key_of_request
from megalite.synthesize.config import EndpointConfig
from megalite.utils.keys import key_of
from megalite.utils.outside import shown

BACK_OFF_S = 0.5
LONGEST_WAIT_S = 60.0
REFUSING = (400, 413, 422)
"""Statuses that are about one request, such as one that is too long."""
PASSING = (408, 409, 425, 429)
"""Statuses, beside those from 500 on, after which another try may help."""
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
"""What models that reason put before their answer, where the server does not take it out."""
OF_A_MESSAGE = 64
"""Tokens that a chat template adds to a message, at most."""

Messages = list[dict[str, str]]


@dataclass
class Spent:
    """What requests cost, in requests, tokens and money."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    tries: int = 0
    unmetered: int = 0
    """Requests of which the endpoint has not said how many tokens they took."""

    def add(self, other: Spent) -> None:
        """Add what others cost."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Endpoint:
    """Asks one model. Raises ConfigError for a key that is not there."""

    def __init__(self, config: EndpointConfig, key: str, answers: Answers) -> None:
        """`key` names the section of the recipe, for messages; `answers` are looked into first,
        and added to."""
        self.config, self._key, self._answers = config, key, answers
        headers = {}
        if config.key_from is not None:
            secret = os.environ.get(config.key_from)
            if not secret:
                raise ConfigError(f"{key}.key_from = {config.key_from!r}: the variable is not set")
            headers["Authorization"] = f"Bearer {secret}"
        # Slots make several requests each, and all of them share these places.
        self._free = asyncio.Semaphore(config.concurrency)
        limits = httpx.Limits(max_keepalive_connections=config.concurrency)
        self._client = httpx.AsyncClient(headers=headers, timeout=config.timeout_s, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(
        self, messages: Messages, seed: int, slot: int, call: int, spent: Spent
    ) -> Answer:
        """Return the answer to `messages`, call number `call` of a slot, and add to `spent` what
        it cost, whenever that was. Raises Unreachable after the last try, and ConfigError for
        what no further try would change."""
        body = self._body(messages, seed)
        key = key_of_request(body, slot, call)
        # What an earlier start has asked is paid for: it counts for the budget, and is not asked again.
        answer = self._answers.get(key)
        if answer is None:
            async with self._free:
                answer = await self._answer(body)
            self._answers.add(key, answer)
        spent.add(self.price(answer))
        return answer

    def price(self, answer: Answer) -> Spent:
        """Return what an answer cost."""
        prompt, completion, price = (
            answer.prompt_tokens,
            answer.completion_tokens,
            self.config.price,
        )
        cost = (prompt * price.input + completion * price.output) / 1e6 if price else 0.0
        return Spent(1, prompt, completion, cost, answer.tries, int(not answer.is_metered))

    def most(self, num_bytes: int, carried: int) -> Spent:
        """Return the most that a request costs whose prompt has `num_bytes` and `carried` earlier
        answers in it. No tokenizer makes more tokens than there are bytes."""
        system = self.config.system or ""
        prompt = (
            num_bytes + len(system.encode()) + 2 * OF_A_MESSAGE + carried * self.config.max_tokens
        )
        return self.price(Answer("", "", prompt, self.config.max_tokens))

    def _body(self, messages: Messages, seed: int) -> dict[str, Any]:
        config = self.config
        if config.system is not None:
            messages = [{"role": "system", "content": config.system}, *messages]
        body: dict[str, Any] = {
            "model": config.model, "messages": messages, "max_tokens": config.max_tokens,
            "temperature": config.temperature, **config.options,
        }  # fmt: skip
        body |= {"top_p": config.top_p} if config.top_p is not None else {}
        body |= {"stop": list(config.stop)} if config.stop else {}
        # Servers take a signed number of 32 bits.
        return body | ({"seed": seed % 2**31} if config.send_seed else {})

    async def _answer(self, body: dict[str, Any]) -> Answer:
        """Ask until there is an answer."""
        why = ""
        for tried in range(self.config.retries + 1):
            try:
                found = await self._client.post(
                    f"{self.config.base_url}/chat/completions", json=body
                )
            except httpx.RequestError as error:  # refused, reset, timed out, torn within a body
                why, wait = f"{type(error).__name__}: {error}".rstrip(": "), 0.0
            else:
                if found.status_code < 400:
                    return self._read(found, body, tried + 1)
                why = f"HTTP {found.status_code}: {_reason(found)}"
                if found.status_code in REFUSING:
                    # About this request alone, so an answer like others: noted, and not asked again.
                    return Answer(why, "refused", tries=tried + 1)
                if found.status_code not in PASSING and found.status_code < 500:
                    # A wrong key or path: every further request would be met by the same.
                    raise ConfigError(f"{self._key}.base_url = {self.config.base_url!r}: {why}")
                wait = _asked_to_wait(found)
            if tried < self.config.retries:
                # Jitter keeps many requests that failed together from coming back together.
                wait = max(wait, BACK_OFF_S * 2**tried * random.uniform(0.5, 1.0))
                await asyncio.sleep(min(wait, LONGEST_WAIT_S))
        tries = f"{self.config.retries + 1} {'tries' if self.config.retries else 'try'}"
        raise Unreachable(
            f"{self._key}.base_url = {self.config.base_url!r}: no answer after {tries} ({why}); what there is is "
            "kept, and the same command goes on from it"
        )

    def _read(self, found: httpx.Response, body: dict[str, Any], tries: int) -> Answer:
        """Return the answer in a response. Raises ConfigError for one that is not OpenAI's."""
        try:
            values = found.json()
            choice = values["choices"][0]
            text, finish = choice["message"]["content"] or "", choice.get("finish_reason") or "stop"
            if not isinstance(text, str) or not isinstance(finish, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ConfigError(
                f"{self._key}.base_url = {self.config.base_url!r} does not answer as OpenAI's chat completions do: "
                f"{shown(found.text)}"
            ) from None
        usage = values.get("usage")
        told = [usage.get(name) for name in USAGE] if isinstance(usage, dict) else []
        counts = [count for count in told if isinstance(count, int)]
        is_metered = len(counts) == len(USAGE)
        # Without a count the most that it can be, so that no budget is exceeded.
        if not is_metered:
            num_bytes = sum(len(message["content"].encode()) for message in body["messages"])
            counts = [num_bytes + 2 * OF_A_MESSAGE, self.config.max_tokens]
        text = _THOUGHTS.sub("", _unicode(text))
        return Answer(text, _unicode(finish), counts[0], counts[1], is_metered, tries)


USAGE = ("prompt_tokens", "completion_tokens")


def seed_of(seed: int, slot: int, call: int) -> int:
    """Return the seed of a request."""
    return key_of(seed, "request", slot, call) % 2**31


def _unicode(text: str) -> str:
    """Return a text that a file can hold: JSON can spell half of a surrogate pair."""
    return text.encode(errors="replace").decode()


def _reason(found: httpx.Response) -> str:
    """Return what an error response says."""
    try:
        return _unicode(str(found.json()["error"]["message"])[:300])
    except (ValueError, LookupError, TypeError):
        return found.text[:300]


def _asked_to_wait(found: httpx.Response) -> float:
    """Return the seconds that a response asks to wait; 0 where it does not say."""
    try:
        wait = float(found.headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0
    return wait if wait > 0 else 0.0  # what is no number has no order
