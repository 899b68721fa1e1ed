"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from omni_jax.engine.outputs import Reply
from omni_jax.serving.engine_thread import Timeline

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0)


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = Counter(
            "omni_responses", "Responses by path and status.", ["path", "status"], registry=self.registry
        )
        self._replies = Counter("omni_replies", "Replies that are complete.", ["finish_reason"], registry=self.registry)
        self._prompt_tokens = Counter("omni_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._text_tokens = Counter("omni_text_tokens", "Tokens of text decoded.", registry=self.registry)
        self._codes = Counter("omni_audio_codes", "Codes of speech decoded.", registry=self.registry)
        self._audio_seconds = Counter("omni_audio_seconds", "Seconds of speech made.", registry=self.registry)
        self._underruns = Counter(
            "omni_audio_underrun",
            "Pieces of streamed speech that came after a player had run dry.",
            registry=self.registry,
        )
        self._ttft = self._histogram("omni_ttft_seconds", "From a prepared request to its first text.", _SECONDS)
        self._ttfp = self._histogram("omni_audio_ttfp_seconds", "The same to its first sound.", _SECONDS)
        self._rtf = self._histogram(
            "omni_audio_rtf", "Seconds from the first sound to the last, by seconds of sound.", _RATIOS
        )

    def add_state(self, name: str, about: str, read: Callable[[], float]) -> None:
        """Registers a number that is read whenever it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def count_response(self, path: str, status: int) -> None:
        """Counts the response to a request of HTTP."""
        self._responses.labels(path, str(status)).inc()

    def count_reply(self, timeline: Timeline, reply: Reply) -> None:
        """Counts a reply that is complete."""
        self._replies.labels(reply.finish_reason).inc()
        self._prompt_tokens.inc(reply.usage.total)
        self._text_tokens.inc(len(reply.token_ids))
        self._codes.inc(len(reply.codec_ids))
        self._audio_seconds.inc(timeline.audio_seconds)
        self._underruns.inc(timeline.underruns)
        if timeline.first_text is not None:
            self._ttft.observe(timeline.first_text - timeline.submitted)
        if timeline.first_audio is not None and timeline.finished is not None and timeline.audio_seconds:
            self._ttfp.observe(timeline.first_audio - timeline.submitted)
            self._rtf.observe((timeline.finished - timeline.first_audio) / timeline.audio_seconds)

    def render(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, about, buckets=buckets, registry=self.registry)
