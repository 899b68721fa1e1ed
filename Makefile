# make demo         asks omni-tiny about a picture by voice, and about a video with sound; its answers are spoken
# make train-demo   trains a tiny random model in the paper's four stages, each from the last one's end
# make speech-demo  takes a small model through all stages of speech, from nothing, and measures it; one to two hours on two cores
# make train-tiny   takes omni-tiny through all its stages, from nothing, and scores it; hours on two cores (docs/omni-tiny.md)
# make test         every test, with PyTorch as the oracle; needs nothing done before
# make test-long    what takes longer: whole benchmarks, several hosts, a Ray cluster, killed runs, parity as users compile it
# make fuzz         154,000 mutants of pictures, sounds, videos, requests and checkpoints; 10 to 20 minutes on two cores
# make audit        asks PyPI which of the installed packages have known vulnerabilities; what it cannot tell of is an error
# make test-page    the server's page in Debian's chromium, with a microphone that plays a voice; needs chromium
# make test-aot     compiles programs of the whole 7B for TPUs, some minutes each; no TPU is needed
# make check        lint, format and types
# make test-newest  the tests that need neither PyTorch nor the TPU compiler, on Python 3.12 with the newest jax and flax
# make clean        removes all that these have made
#
# Variables: PYTHON (3.11 or newer) and PYTHON312 make the environments; MODEL=DIR has the demo ask a converted model;
# SHORT=1 has train-tiny take a part of its steps and data, some 20 minutes.

NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
PYTHON312 ?= python3.12

VENV = .venv
NEWEST = .venv-newest
AUDIT = .venv-audit
BIN = $(VENV)/bin
MEDIA = --image tests/media/picture.jpg --audio tests/media/speech.wav --video tests/media/video.mp4
QUESTION = --text "What do you see and hear?"

# the oracle's video processor imports it; apart, for its compiled half does not fit every PyTorch (tests/torchvision_stub.py)
TORCHVISION = test -d $(VENV)/torchvision || \
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision torchvision==0.28.0

# the oracle of the speech tokenizer; apart, for what else it brings would not go with the other oracle (tests/codec_oracle.py)
QWEN_TTS = test -d $(VENV)/qwen_tts || \
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/qwen_tts qwen-tts==0.1.1 einops==0.8.1

# the compiler for TPUs; apart, for wherever it is installed JAX looks for a TPU and complains that there is none
LIBTPU = test -d $(VENV)/libtpu || \
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/libtpu libtpu==0.0.42.1

PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# compiling is half of the time of the tests; LLVM's cheap passes and XLA's older loops take half as long
# (releases from 0.12 on have the newer loops alone, and end at a flag that they do not know)
OLD_LOOPS = from importlib.metadata import version; \
	print('--xla_cpu_use_fusion_emitters=false' if version('jaxlib').split('.') < ['0', '12'] else '')
# (and a program is compiled in one piece: several would be compiled side by side, but the cores are busy anyway)
QUICKLY = JAX_DISABLE_MOST_OPTIMIZATIONS=true \
	XLA_FLAGS="$$($(1)/python -c "$(OLD_LOOPS)") --xla_cpu_parallel_codegen_split_count=1"

.PHONY: demo train-demo train-asr speech-demo train-tiny test test-long fuzz audit test-page test-aot check test-newest clean

demo: $(VENV)/installed-run
ifdef MODEL
	$(BIN)/python serve.py chat --model "$(MODEL)" $(MEDIA) $(QUESTION)
else
	@echo "omni-tiny has thirteen million parameters, and knows a hundred words and a dozen shapes (docs/omni-tiny.md)."
	@mkdir -p out/demo
	@echo; echo "A picture (tests/media/tiny/picture.png), and a spoken question (question.wav) about it:"
	$(BIN)/python serve.py chat --model checkpoints/omni-tiny --voice heart --out out/demo/picture.wav \
		--image tests/media/tiny/picture.png --audio tests/media/tiny/question.wav
	@echo; echo "A video with sound (tests/media/tiny/video.mp4):"
	$(BIN)/python serve.py chat --model checkpoints/omni-tiny --voice rms --out out/demo/video.wav \
		--video tests/media/tiny/video.mp4 --text "What happens?"
	$(BIN)/python tools/spectrogram.py out/demo/picture.wav out/demo/picture.png
	$(BIN)/python tools/spectrogram.py out/demo/video.wav out/demo/video.png
	@echo
	@echo "The spoken answers are out/demo/picture.wav and video.wav, pictures of them lie beside them. For another model:"
	@echo "  $(BIN)/python tools/convert.py to-jax FOLDER-OF-QWEN2.5-OMNI out/model && make demo MODEL=out/model"
endif

train-asr: $(VENV)/installed-test
	$(BIN)/python tools/train_asr.py out/asr

train-demo: $(VENV)/installed-run
	rm -rf out/train
	$(BIN)/python tools/train_demo.py out/train

speech-demo: $(VENV)/installed-judges
	$(BIN)/python tools/speech_demo.py out/speech

train-tiny: $(VENV)/installed-judges
	$(BIN)/python tools/train_tiny.py $(if $(SHORT),out/omni-tiny-short --short,out/omni-tiny)

test: $(VENV)/installed-test
	$(call QUICKLY,$(BIN)) $(BIN)/python $(PYTEST)

test-long: $(VENV)/installed-test
	$(BIN)/python $(PYTEST) -m long --ignore-glob='*_parity.py'
	$(BIN)/python $(PYTEST) -m 'not aot' $$(find tests -name '*_parity.py')

# one of the commands alone, or a single case: python -m tests.fuzz --help
fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.fuzz all

audit: $(VENV)/installed-test
	test -d $(AUDIT) || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(AUDIT)/installed.txt

test-page: $(VENV)/installed-page
	@command -v chromium >/dev/null || { echo "no chromium found: apt install chromium"; exit 1; }
	$(BIN)/python -m pytest -m page tests/serving/test_page.py

test-aot: $(VENV)/installed-test
	$(BIN)/python -m pytest -m aot tests/tools/test_aot.py

check: $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-newest: $(NEWEST)/installed
	$(call QUICKLY,$(NEWEST)/bin) $(NEWEST)/bin/python $(PYTEST) --ignore-glob='*_parity.py' --ignore=tests/tools/test_aot.py

# a stamp in the environment says what is installed; it is made again when the requirements change
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or say PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "$(PYTHON) is older than 3.11; say PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-run: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .[plots]
	touch $@

$(VENV)/installed-test: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .[plots,test]
	$(TORCHVISION)
	$(QWEN_TTS)
	$(LIBTPU)
	touch $@ $(VENV)/installed-run

# Resemblyzer names a package that has to be compiled, and does without it
$(VENV)/installed-judges: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -e .[plots,test,judges,speech-data]
	$(BIN)/python -m pip install --quiet --no-deps Resemblyzer==0.1.4
	touch $@

$(VENV)/installed-page: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet -e .[test-page]
	touch $@

$(VENV)/installed-check: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .[plots,test,check]
	$(TORCHVISION)
	$(QWEN_TTS)
	$(LIBTPU)
	touch $@ $(VENV)/installed-test $(VENV)/installed-run

$(NEWEST)/installed: setup.cfg pyproject.toml
	@$(PYTHON312) -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null || { \
		echo "$(PYTHON312) is no Python 3.12: install one (apt install python3.12-venv, pyenv install 3.12, or"; \
		echo "uv python install 3.12) and say PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e .[plots,test-core] jax flax
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(AUDIT) out .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
