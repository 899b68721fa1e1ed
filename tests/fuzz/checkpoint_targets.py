"""Folders of checkpoints: ``spk_dict.pt``, headers of safetensors, configurations, tokenizers and chat templates."""

from __future__ import annotations

import io
import json
import pickletools
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np

from omni_jax.checkpoint import pytorch, store, voices
from omni_jax.checkpoint.model_files import copy_published_files, write_thinker_config
from omni_jax.config import OmniConfig
from omni_jax.config_file import read_config_file
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.processor import Processor
from tests.fuzz.mutate import HOSTILE, PATHS, dump_json, mutate_bytes, mutate_inside, mutate_json
from tests.fuzz.target import Case, Target
from tools.make_checkpoint import write_checkpoint

# the program of a file that torch.save has written, of two voices; our own writer leaves out what torch remembers
_TORCH_PROGRAM = (
    b"\x80\x02}q\x00(X\x07\x00\x00\x00Chelsieq\x01}q\x02(X\t\x00\x00\x00bos_tokenq\x03K\x05X\x04\x00\x00\x00condq\x04"
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\nFloatStorage\nq\x07X\x01\x00\x00\x00"
    b"0q\x08X\x03\x00\x00\x00cpuq\tK\x04tq\nQK\x00K\x01K\x04\x86q\x0bK\x04K\x01\x86q\x0c\x89ccollections\nOrderedDict\n"
    b"q\r)Rq\x0etq\x0fRq\x10X\x07\x00\x00\x00ref_melq\x11h\x05((h\x06h\x07X\x01\x00\x00\x001q\x12h\tKHtq\x13QK\x00K\x01K\t"
    b"K\x08\x87q\x14KHK\x08K\x01\x87q\x15\x89h\r)Rq\x16tq\x17Rq\x18uX\x05\x00\x00\x00Ethanq\x19}q\x1a(h\x03h\x05((h\x06"
    b"ctorch\nLongStorage\nq\x1bX\x01\x00\x00\x002q\x1ch\tK\x01tq\x1dQK\x00K\x01\x85q\x1eK\x01\x85q\x1f\x89h\r)Rq tq!Rq"
    b"\"h\x04h\x05((h\x06ctorch\nHalfStorage\nq#X\x01\x00\x00\x003q$h\tK\x04tq%QK\x00K\x01K\x04\x86q&K\x04K\x01\x86q'\x89"
    b"h\r)Rq(tq)Rq*h\x11h\x05((h\x06h\x07X\x01\x00\x00\x004q+h\tKHtq,QK\x00K\x01K\tK\x08\x87q-KHK\x08K\x01\x87q.\x89h\r)R"
    b"q/tq0Rq1uu."
)
_ENTRIES: dict[str, bytes] = {
    "data.pkl": _TORCH_PROGRAM,
    "byteorder": b"little",
    "data/0": np.ones(4, np.float32).tobytes(),
    "data/1": np.zeros(72, np.float32).tobytes(),
    "data/2": np.array([6], np.int64).tobytes(),
    "data/3": np.ones(4, np.float16).tobytes(),
    "data/4": np.zeros(72, np.float32).tobytes(),
    "version": b"3\n",
}
# instructions that a program may be given: some that data needs, and all that Python's own machine would act on
_INSTRUCTIONS = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"),
    *(b"X\x08\x00\x00\x00touch /x", b"(", b")", b"t", b"R", b"Q", b"}", b"]", b"u", b"s", b"e", b"a", b"b", b"o", b"0"),
    *(b"2", b"1", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"N", b"K\x00", b"J\xff\xff\xff\xff", b"q\x00"),
    *(
        b"h\x00",
        b"h\xff",
        b"j\xff\xff\xff\xff",
        b"\x8a\x08" + b"\xff" * 8,
        b"I99\n",
        b"F1e999\n",
        b"ios\nsystem\n",
        b".",
    ),
    *(b"\x8c\x02os", b"\x93", b"\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x92", b"Pdata/0\n", b"\x82\x01"),
    *(b"G\x7f\xf0" + bytes(6), b"\x8b\xff\xff\xff\x7f", b"M\xff\xff", b"S'a'\n", b"C\x01a", b"\x97", b"\x98"),
)


class Voices(Target):
    """Mutants of ``spk_dict.pt``: of its bytes, of its entries, and of the instructions of its program."""

    own_errors = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = self.work / voices.PUBLISHED_FILE
        whole = self.work / "whole"
        write_checkpoint(whole, OmniConfig.tiny(), dtype="float32")
        self._ours = (whole / voices.PUBLISHED_FILE).read_bytes()
        self._seeds = {"torch.save": zip_entries(_ENTRIES), "write_spk_dict": self._ours}

    def list_seeds(self) -> list[Case]:
        return [Case(name, data) for name, data in self._seeds.items()]

    def make_case(self, rng: random.Random, number: int) -> Case:
        kind = rng.choice(("bytes", "entry", "program", "program"))
        if kind == "bytes":
            seeds = list(self._seeds.values())
            return Case("bytes", mutate_bytes(rng, rng.choice(seeds), seeds))
        entries = dict(_ENTRIES)
        name = "data.pkl" if kind == "program" else rng.choice(list(entries))
        mutate = mutate_program if kind == "program" else mutate_bytes
        entries[name] = mutate(rng, entries[name], [*entries.values(), *_INSTRUCTIONS])
        if rng.random() < 0.1:
            entries[rng.choice(("data/9", "a/data.pkl", "../x", "/etc/x", name + "/"))] = entries[name]
        return Case(kind, zip_entries(entries, rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))))

    def run_case(self, case: Case) -> None:
        self._path.write_bytes(case.data)
        found = voices.read_spk_dict(self._path)
        for voice in found.values():
            assert 0 <= voice.bos_token < 2**31 and np.isfinite(voice.cond).all() and np.isfinite(voice.ref_mel).all()


def zip_entries(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive like that of torch.save, with the check sums of what is in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"spk_dict/{name}"), data, compression)
    return file.getvalue()


def mutate_program(rng: random.Random, program: bytes, others: list[bytes]) -> bytes:
    """A pickle some of whose instructions are dropped, doubled, moved, replaced or given other numbers."""
    places = [place for _, _, place in pickletools.genops(program) if place is not None]
    pieces = [program[begin:end] for begin, end in zip(places, [*places[1:], len(program)], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(pieces))
        match rng.randrange(6):
            case 0:
                del pieces[place]
                pieces = pieces or [b"."]
            case 1:
                pieces[place:place] = [rng.choice(pieces)] * rng.choice((1, 1, 2, 500))
            case 2:
                pieces[place] = rng.choice(_INSTRUCTIONS)
            case 3:
                pieces.insert(place, rng.choice(_INSTRUCTIONS))
            case 4:
                other = rng.randrange(len(pieces))
                pieces[place], pieces[other] = pieces[other], pieces[place]
            case _:
                pieces[place] = mutate_bytes(rng, pieces[place], others)[:4096]
    return b"".join(pieces)


# --- folders ---

_TEMPLATE_PIECES = (
    *(
        "{{ messages }}",
        "{{ 'a' * 10000000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}",
    ),
    *(
        "{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self }}",
    ),
    *("{% macro a(b) %}{{ a(b) }}{% endmacro %}{{ a(1) }}", "{{ messages | tojson(indent=99) }}", "{{ 2 ** 9999999 }}"),
    *(
        "{% set x = namespace(a=[]) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception(messages) }}",
        "{{ '%c' % 3 }}",
    ),
    *(
        "{{ messages[0].content.upper() }}",
        "{{ messages | map(attribute='x') | list }}",
        "{{ strftime_now('%' * 300) }}",
    ),
    *(
        "{{ range(10 ** 9) | list }}",
        "{% generation %}",
        "{{ messages * 10000000 }}",
        "{{ loop.first }}",
        "{{ 1 / 0 }}",
    ),
    *(
        "{{ messages[9].role }}",
        "{% raw %}",
        "{# ",
        "{{ [] | first | int(base=99) }}",
        "{{ 'x' | float | int }}",
        "\0",
        "\ud800",
    ),
)
_TENSOR_VALUES = (
    *({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "F64", "BF16", [2**62, 4], [2**40, 2**40], [0], [0] * 9),
    *([0, 2**63], [8, 0], [True, 2], [1.0], [-1], "model.safetensors", "../a.safetensors", "/etc/passwd"),
)
_CONFIG_VALUES = (2**14, 2**14 + 1, 3, 4, 12, 1e30, "default", "axial", "silu", "bfloat16", [16, 24, 24], [1] * 65)


class Folders(Target):
    """A published folder and one of ours, one file of which is a mutant; everything of it but parameters is read."""

    own_errors = (CheckpointError, ConfigError, InputError)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = self.work / "published"
        write_checkpoint(self._folder, OmniConfig.tiny(), dtype="float32")
        self._add_files()
        names = [path.name for path in self._folder.iterdir() if path.name not in ("merges.txt", "vocab.json")]
        self._contents = {name: (self._folder / name).read_bytes() for name in sorted(names)}
        # of a file of parameters the header alone is made again
        self._size = len(self._contents["model.safetensors"])
        self._contents["model.safetensors"] = _read_header_bytes(self._contents["model.safetensors"])
        self._shards = {"model.safetensors.index.json", "one.safetensors"}

    def _add_files(self) -> None:
        """What a published folder may have in place of others, and the files of a folder of ours."""
        header = json.loads(_read_header_bytes((self._folder / "model.safetensors").read_bytes()))
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(header.keys() - {"__metadata__"}, "one.safetensors"),
        }
        template = json.loads((self._folder / "chat_template.json").read_bytes())["chat_template"]
        preprocessor = json.loads((self._folder / "preprocessor_config.json").read_bytes())
        sections = {"feature_extractor": preprocessor, "image_processor": preprocessor, "processor_class": "P"}
        for name, value in {
            "model.safetensors.index.json": index,
            "processor_config.json": {**sections, "video_processor": preprocessor},
            "omni_jax.json": {"format": 1, "components": {"thinker": ["bfloat16"], "token2wav": ["float32"]}},
        }.items():
            (self._folder / name).write_text(json.dumps(value), encoding="utf-8")
        (self._folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        voices.save_voices(self._folder, voices.read_spk_dict(self._folder / voices.PUBLISHED_FILE))

    def list_seeds(self) -> list[Case]:
        return [Case(name, data) for name, data in self._contents.items()]

    def make_case(self, rng: random.Random, number: int) -> Case:
        # headers and configurations more often than the rest
        often = ("model.safetensors", "config.json", "chat_template.jinja")
        label = rng.choice((*self._contents, *often, *often))
        data = self._contents[label]
        if label.endswith(".npz"):
            return Case(label, mutate_archive(rng, data))
        if rng.random() < 0.2 or label.endswith(".pt"):
            return Case(label, mutate_bytes(rng, data, list(self._contents.values())))
        if label.endswith(".jinja"):
            return Case(label, mutate_template(rng, data.decode()).encode(errors="surrogatepass"))
        hostile = (*HOSTILE, *PATHS, *_TENSOR_VALUES, *_CONFIG_VALUES)
        values = json.loads(data)
        if label == "chat_template.json" and rng.random() < 0.7:
            return Case(label, dump_json({"chat_template": mutate_template(rng, values["chat_template"])}))
        if label in ("model.safetensors", "model.safetensors.index.json", "tokenizer.json", "config.json"):
            mutate_inside(rng, values, hostile)
        else:
            values = mutate_json(rng, values, hostile)
        return Case(label, dump_json(values))

    def run_case(self, case: Case) -> None:
        path = self._folder / case.label
        kept = path.read_bytes()
        try:
            if case.label == "model.safetensors":
                path.write_bytes(len(case.data).to_bytes(8, "little") + case.data)
                with path.open("r+b") as file:
                    file.truncate(
                        max(self._size + len(case.data) - len(self._contents[case.label]), 8 + len(case.data))
                    )
            else:
                path.write_bytes(case.data)
            self._read_folder(case.label)
        finally:
            path.write_bytes(kept)

    def _read_folder(self, label: str) -> None:
        """Reads what a conversion and a load read before they come to parameters."""
        folder = self._folder
        if label == "model.safetensors.index.json":
            _read_shards(folder)
        config = OmniConfig.from_dict(read_config_file(folder))
        pytorch.check_tensors(folder, pytorch.read_headers(folder), config)
        voices.check(voices.read_spk_dict(folder / voices.PUBLISHED_FILE), config, folder)
        target = self.work / "target"
        target.mkdir()
        try:
            copy_published_files(folder, target)
            _use_processor(Processor.load(target))
            write_thinker_config(target)
        finally:
            shutil.rmtree(target)
        store.components(folder)
        voices.check(voices.load_voices(folder), config, folder)
        _use_processor(Processor.load(folder))


def _use_processor(processor: Processor) -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b <|im_end|>"}]},
    ]
    prompt = processor(messages)
    vocab_size = processor.config.thinker_config.text_config.vocab_size
    assert 0 <= prompt.tokens.min() <= prompt.tokens.max() < vocab_size, "a token outside of the vocabulary"
    processor.decode(prompt.tokens.tolist())


def _read_header_bytes(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _read_shards(folder: Path) -> None:
    """The same folder as one of several files with an index."""
    whole = folder / "model.safetensors"
    shard = folder / "one.safetensors"
    whole.rename(shard)
    try:
        pytorch.read_headers(folder)
    finally:
        shard.rename(whole)


def mutate_template(rng: random.Random, template: str) -> str:
    """A chat template with pieces of others, and with tags dropped, doubled and moved."""
    pieces = template.replace("{", "\n{").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        place = rng.randrange(len(pieces))
        match rng.randrange(4):
            case 0:
                pieces.insert(place, rng.choice(_TEMPLATE_PIECES))
            case 1:
                pieces[place] = rng.choice(_TEMPLATE_PIECES)
            case 2:
                pieces.insert(place, rng.choice(pieces) * rng.choice((1, 1, 300)))
            case _:
                pieces[place] = pieces[place][: rng.randrange(len(pieces[place]) + 1)]
    return "".join(pieces)


def mutate_archive(rng: random.Random, data: bytes) -> bytes:
    """An ``.npz`` file, one entry of which is a mutant behind a check sum that is right."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, [])
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w") as archive:
        names = source.namelist()
        chosen = rng.choice(names)
        for name in names:
            entry = source.read(name)
            archive.writestr(zipfile.ZipInfo(name), mutate_bytes(rng, entry, []) if name == chosen else entry)
    return file.getvalue()
