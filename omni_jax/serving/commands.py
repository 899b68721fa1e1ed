"""The options of ``serve.py``'s commands. ``serving.chat`` and ``serving.batch`` do what they ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omni_jax.engine.request import TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.generation.options import Options
from omni_jax.models.ode_solver import Method
from omni_jax.processing.captions import CaptionFormat
from omni_jax.processing.worker_pool import MediaLimits
from omni_jax.sharding import MeshConfig

_DIR = tyro.conf.arg(metavar="DIR")
_FILE = tyro.conf.arg(metavar="FILE")
_HOSTS = tyro.conf.arg(metavar="HOSTS")
_PREFIXES = tyro.conf.arg(metavar="gs://BUCKET/FOLDER")
_FLAT = tyro.conf.arg(name="")  # the fields become options without the name of what holds them


@dataclass(frozen=True)
class TalkerOptions:
    """How the answer is spoken."""

    temperature: float | None = None
    """0 takes the most probable code each time (greedy); more varies more. Without it, or another of the next three,
    as the checkpoint's generation_config.json says, or as published: 0.9."""
    top_k: int | None = None
    """Draw among the k most probable codes; 0: among all. 40 is published."""
    top_p: float | None = None
    """Draw among the most probable codes that together have this probability, above 0. 0.8 is published."""
    repetition_penalty: float | None = None
    """Above 1 makes every code that there was less probable. 1.05 is published."""
    seed: int | None = None
    """Of the random draws; without it, that of the text."""
    max_tokens: int = TalkerParams.max_tokens
    """Codes, 50 a second, at most."""


@dataclass(frozen=True)
class Token2WavOptions:
    """How codes become sound."""

    solver: Method | None = None
    """How the flow is integrated: rk4 evaluates its network four times a step, midpoint twice, euler and adams once.
    Without it, as the checkpoint says, or as published: rk4."""
    steps: int | None = None
    """Of the flow, likewise; 9 are published. With fewer evaluations than those 36 sound is made sooner, and is
    another."""


@dataclass(frozen=True)
class RayOptions:
    """Where the actors run."""

    actors: int = 1
    """That hold a model each, or replicas of the server."""
    address: str = ""
    """Of the cluster; without it, one is started on this machine."""
    resources: str = ""
    """That an actor takes, for instance TPU=4; without it, a CPU."""
    slice: str = ""
    """In place of resources: each actor takes a whole slice of TPUs, for instance v6e:4x4, and holds its model over all
    of its hosts, as --mesh says. A replica of the server is one host: v6e:2x4 at most."""


@dataclass(frozen=True)
class ChatCommand:
    """Asks a model one question and prints its answer as it is made.

    Only the answer goes to stdout, and its sound to a file, both as they are made; progress, and the time of each stage
    at the end, go to stderr. The model sees images first, then sounds, then videos, each kind in the order given, and
    the text last: it was trained with media before the question.

    For instance:

        python serve.py chat --model out/model \\
            --image menu.jpg --text "Which dish is cheapest?" --out answer.wav
    """

    model: Annotated[Path, _DIR]
    """Folder that tools/convert.py to-jax wrote."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask. Given again, the texts follow each other as they are."""
    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A picture."""
    audio: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A sound, or a video of which only the sound is wanted."""
    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A video."""
    speak: bool = False
    """Speak the answer too, into reply.wav unless --out names another file."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.wav")] = None
    """Speak the answer into this file: 24 kHz, 16 bits, one channel. It grows while the answer is made."""
    captions: tyro.conf.UseAppendAction[tuple[CaptionFormat, ...]] = ()
    """Write when which words are spoken into a file beside that of the sound, answer.srt or answer.vtt, in place of one
    that is there."""
    voice: str | None = None
    """Who speaks; without it, Chelsie, or the checkpoint's first voice. With --ref-audio: in whose manner."""
    ref_audio: Annotated[str | None, _FILE] = None
    """A clip, 1 to 30 seconds, of the voice to speak in."""
    ref_text: str | None = None
    """What the clip says, word for word; without it, it gives the timbre alone."""
    speaker_model: Annotated[Path | None, tyro.conf.arg(metavar="FILE.onnx|DIR")] = None
    """What makes the speaker vector of a clip: an ONNX file (CAM++), or a checkpoint with a speaker verifier; without
    it, --model's own."""
    speech_tokenizer: Annotated[Path | None, _DIR] = None
    """A checkpoint whose speech tokenizer makes codes of clips whose text is given; without it, --model's own."""
    talker: TalkerOptions = field(default_factory=TalkerOptions)
    token2wav: Token2WavOptions = field(default_factory=Token2WavOptions)
    adapter: Annotated[Path | None, _DIR] = None
    """Answer with this adapter (LoRA): a folder as peft writes it, or that of a training run. (A run's folder as
    --model has its adapter merged.)"""
    system: str | None = None
    """The system prompt; without it, the chat template's own, or with --out the one that speech was trained with."""
    reply_text: str | None = None
    """Have this text be the answer, and speak it: text to speech."""
    use_audio_in_video: Literal["auto", "true", "false"] = "auto"
    """Whether to hear the videos too. auto: those that have a sound track; true: a silent video is an error."""
    fps: float | None = None
    """Frames to look at in each second of a video; without it, the model's usual 2."""
    max_tokens: int = Options.max_tokens
    """Length of the answer in tokens, at most."""
    sampling: Annotated[SamplingParams, _FLAT] = field(default_factory=SamplingParams)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End the answer before this string."""
    allow_web: Annotated[tuple[str, ...], _HOSTS] = ()
    """Fetch media from these hosts: example.com, '*.example.com' for all below it, '*' for every public one."""
    allow_buckets: Annotated[tuple[str, ...], _PREFIXES] = ()
    """Read media that lie here in a bucket, with the account of this machine."""
    isolate_media: bool = True
    """Decode media in a process of its own, each within two minutes and 8 GiB; without it, in this one."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What to compute in; without it, what the checkpoint holds."""
    quantization: Literal["int8", "int4"] | None = None
    """Keep the linear maps of the language models in 8 bits, or those of the Thinker's layers in 4."""
    kv_cache_dtype: Literal["int8"] | None = None
    """Keep what the language models remember of a dialogue, their keys and values, in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the commands that answer many requests have in common: the model, and what requests may cost."""

    model: Annotated[Path, _DIR]
    """Folder that tools/convert.py to-jax wrote."""
    allow_web: Annotated[tuple[str, ...], _HOSTS] = ()
    """Fetch media from these hosts: example.com, '*.example.com' for all below it, '*' for every public one."""
    allow_buckets: Annotated[tuple[str, ...], _PREFIXES] = ()
    """Read media that lie here in a bucket, with the account of this machine."""
    slots: int = 16
    """Requests that are answered at once, and as many that are spoken at once."""
    workers: int = field(default_factory=lambda: max(1, min(8, (os.cpu_count() or 2) // 2)))
    """Processes that decode media."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """What the media of one request may cost."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices to spread the model over, for instance --mesh.tensor 4; by default it lies on one."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What to compute in; without it, what the checkpoint holds."""
    quantization: Literal["int8", "int4"] | None = None
    """Keep the linear maps of the language models in 8 bits, or those of the Thinker's layers in 4."""
    kv_cache_dtype: Literal["int8"] | None = None
    """Keep what the language models remember of a dialogue, their keys and values, in 8 bits."""
    token2wav: Token2WavOptions = field(default_factory=Token2WavOptions)
    speaker_model: Annotated[Path | None, tyro.conf.arg(metavar="FILE.onnx|DIR")] = None
    """What makes speaker vectors, for requests that bring a clip as their voice: an ONNX file (CAM++), or a checkpoint
    with a speaker verifier; without it, --model's own."""
    speech_tokenizer: Annotated[Path | None, _DIR] = None
    """A checkpoint whose speech tokenizer makes codes of clips whose text is given; without it, --model's own."""
    adapters: Annotated[dict[str, Path], tyro.conf.arg(metavar="NAME DIR ...")] = field(default_factory=dict)
    """Adapters of the Thinker (LoRA) that a request may choose as its "adapter": folders as peft writes them, or of
    training runs. One that chooses none is answered by the model itself."""
    warmup_tokens: int = 2048
    """Compile at first for prompts with replies of so many tokens; for longer ones when they come. 0: for none."""
    warmup_windows: int = 32
    """The same for pictures of so many windows of 112 x 112 pixels."""
    warmup_clip_seconds: float = 0.0
    """The same for clips of so many seconds that requests bring along as their voice."""
    compile_cache: Annotated[Path | None, _DIR] = None
    """Keep compiled programs here, so that the next start is fast; without it, in ~/.cache/omni_jax/compiled."""


@dataclass(frozen=True, kw_only=True)
class BatchCommand(ModelOptions):
    """Answers a file of requests, as many at once as there are slots.

    A request is a line as OpenAI's batches have them: custom_id, method "POST", url "/v1/chat/completions", and a body
    as of a chat completion, with media as paths, data: URLs or addresses. A result is a line with the custom_id and a
    response or an error, in the order in which they are done. What is wrong with a line costs that line alone.

    Results are written as they are made. A run that was killed goes on when it is started again in the same way: what
    has a result is not done again. Progress and the summary go to stderr, the summary as JSON to stdout.

    For instance:

        python serve.py batch --model out/model -i requests.jsonl -o results.jsonl --audio-dir speech
    """

    input: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl", aliases=["-i"])]
    """The requests; this, the results and the speech may be in a bucket (gs://)."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl", aliases=["-o"])]
    """The results; a run that was killed is continued in it."""
    audio_dir: Annotated[str | None, _DIR] = None
    """Write speech into files here, with their paths in the results; without it, it is in the results, in base64."""
    captions: tyro.conf.UseAppendAction[tuple[CaptionFormat, ...]] = ()
    """Write when which words are spoken into a file beside that of the sound, in --audio-dir."""
    media_root: Annotated[str | None, _DIR] = None
    """Media must lie within this folder; without it, within that of the requests, from which relative paths start."""
    engine: Literal["local", "ray"] = "local"
    """ray: --ray.actors processes over the machines of a Ray cluster, which all see the files at the same paths."""
    ray: RayOptions = field(default_factory=RayOptions)
    """The actors of --engine ray."""
    distributed: bool = False
    """The same command on every host of a slice, over which --mesh spreads the model; the first one writes. On a pod
    of TPUs, under Slurm and on Kubernetes they find each other."""
    coordinator: str | None = None
    """host:port of process 0, where they do not."""
    processes: int | None = None
    """How many there are, where they do not find each other."""
    process: int | None = None
    """Which one this is, from 0."""


@dataclass(frozen=True, kw_only=True)
class HttpCommand(ModelOptions):
    """Answers over HTTP, as OpenAI's API does.

    Clients of OpenAI's are pointed at http://HOST:PORT/v1: chat completions with speech, text to speech, transcription,
    voices. /docs has all that it takes. Nothing else is stored of requests, and their content is in no log.

    For instance:

        python serve.py http --model out/model --port 8000
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's. Then give --api-keys too, and put TLS before it."""
    port: int = 8000
    """0: one that is free, which is printed."""
    name: str = ""
    """What requests call the model; without it, the name of its folder."""
    media_root: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIRS")] = ()
    """Folders within which requests may name files of this machine; without any, they may name none."""
    api_keys: Annotated[Path | None, _FILE] = None
    """A file of keys, one a line; a request must have one of them, or that of the variable OMNI_API_KEY."""
    cors_origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URLS")] = ()
    """Pages of these origins may ask from a browser: https://example.com, or '*' for all."""
    queue: int = 64
    """Requests that may wait beyond those that have a slot; more are refused with status 503."""
    max_body_megabytes: float = 64.0
    """Of a request, its media included."""
    prefix_gigabytes: float = 0.5
    """Of the device's memory, to keep what was read of streamed dialogues for their next turns; the 7B takes 65 KB a
    token."""
    files_gigabytes: float = 4.0
    """Of the files of /v1/files together; they are kept until the server ends."""
    voices_dir: Annotated[str | None, _DIR] = None
    """Keep voices that are added here; without it, they are gone when the server ends."""
    transcription_prompt: str = ""
    """What the model is asked to write down speech with, {language} in place of the language; without it, as in the
    published evaluation."""
    sessions: int = 16
    """Realtime sessions at once; each has caches of its own while somebody speaks."""
    voice_detector: Annotated[Path | None, tyro.conf.arg(metavar="FILE.onnx")] = None
    """Silero's network that tells voice from noise in realtime sessions; without it, WebRTC's detector does."""
    drain_seconds: int = 60
    """When told to stop, finish what was asked, for so long."""
    engine: Literal["local", "ray"] = "local"
    """ray: --ray.actors replicas of the server, each with a model, over the machines of a Ray cluster (Ray Serve)."""
    ray: RayOptions = field(default_factory=RayOptions)
    """The replicas of --engine ray."""
