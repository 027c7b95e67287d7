# The verbs of the house; CI uses the same ones. Everything runs inside .venv.
#
#   make demo     talk to the shipped model in the browser
#   make test     the tests, in minutes
#   make setup TORCH_BACKEND=cpu      torch's CPU builds (uv's own switch, handed through)

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed$(if $(TORCH_BACKEND),-$(TORCH_BACKEND))
CODE := audio_codec synth_data speechlm streaming demo tests
# A file of tests stays in one process, for it shares what it has loaded.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup demo check fix test test-all bench tiny shipped sweep lock

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## install the locked dependencies and the project into .venv

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("speechlm needs Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV_INSTALL) $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) --requirement requirements.lock
	$(UV_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## talk to the shipped model: http://127.0.0.1:7860
	$(BIN)/speechlm demo

check: setup  ## format, lint, layers, types, spelling
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell

fix: setup  ## what of `check` can be mended by a program
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

test: setup  ## all but the slow tests and those that need a GPU
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(PARALLEL)

test-all: setup  ## every test that this machine can run
	$(BIN)/python -m pytest -q

bench: setup  ## frame times on this machine
	$(BIN)/speechlm bench

# Each stage goes on where it stopped; a finished one is passed over. It is asked about what it was
# trained on, in wordings that it was not.
tiny: setup  ## a smaller model from nothing, in runs/tiny, up to a spoken answer
	$(BIN)/speechlm synth speech configs/synth/speech_tiny.yaml
	$(BIN)/speechlm synth speech configs/synth/speech_tiny_heldout.yaml
	$(BIN)/speechlm train tokenizer configs/tokenizer/tiny.yaml --resume
	$(BIN)/speechlm train codec configs/codec/tiny.yaml --resume
	$(BIN)/speechlm synth dialogues configs/synth/dialogues_tiny.yaml
	$(BIN)/speechlm train lm configs/lm/tiny.yaml --resume
	$(BIN)/speechlm eval spoken-qa --model runs/tiny/lm/lm --questions 36 --unknown 8 --no-long \
		--voices espeak:en-us --voices espeak:en-gb-x-rp --voices espeak:en-us+m3 \
		--category next_number --category numbers --category days --category months \
		--assistant espeak:en-us+f2@rate=150
	$(BIN)/speechlm synth inspect data/tiny/heldout --sample s1-0000004 --out runs/tiny
	$(BIN)/speechlm chat --model runs/tiny/lm/lm --input runs/tiny/s1-0000004.wav --output runs/tiny/answer.wav

# Hours on two cores; wants flite, and recordings and texts in ../shared/data. The shipped weights were
# trained on over three releases with some values changed: their card.json says which.
shipped: setup  ## the long recipe from nothing, as far as runs/shipped/lm/lm
	for part in users assistant recorded noise heldout assistant_heldout; do \
		$(BIN)/speechlm synth speech configs/synth/speech_$$part.yaml || exit; done
	$(BIN)/speechlm synth speech configs/synth/speech_users.yaml output=data/shipped/users_b hours=24 seed=21
	$(BIN)/speechlm train tokenizer configs/tokenizer/shipped.yaml --resume
	$(BIN)/speechlm train codec configs/codec/shipped.yaml --resume
	$(BIN)/speechlm synth dialogues configs/synth/dialogues.yaml
	$(BIN)/speechlm synth dialogues configs/synth/dialogues_heldout.yaml
	$(BIN)/speechlm train lm configs/lm/shipped.yaml --resume

# Rates and look-aheads have a twin without a bottleneck each, and codebooks that of their rate. The
# names of variables are those of the runs; a comma of a list would end an argument of `call`.
SHAPES := rate=12.5 rate=50 rate=25 rate=6.25 lookahead_ms=80 lookahead_ms=160 block_ms=480 block_ms=4000
fsq_625 := 'model.levels=[5,5,5,5]'
fsq_16807 := 'model.levels=[7,7,7,7,7]'
vq_625 := model.bottleneck=vq model.codes=625
vq_4375 := model.bottleneck=vq model.codes=4375
define swept
	$(BIN)/speechlm train tokenizer configs/tokenizer/sweep.yaml --resume run.dir=runs/sweep/$(subst =,_,$(1)) $(2)

endef

# After `shipped`; a quarter of an hour a run on a thread, the sweep about three hours on two.
sweep: setup  ## tokenizers of many rates, look-aheads and codebooks, with their twins, compared
	$(foreach shape,$(SHAPES),$(call swept,$(shape),model.$(shape))$(call swept,twin_$(shape),model.$(shape) unquantized=true))
	$(foreach codebook,fsq_625 fsq_16807 vq_625 vq_4375,$(call swept,$(codebook),$($(codebook))))
	$(BIN)/speechlm eval tokenizer --sweep runs/sweep --recorded ../shared/data --report runs/sweep/report \
		--json runs/sweep/scores.json

# What torch's own metadata pins stays out, so that torch's CPU build brings none of it.
lock: setup  ## choose the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --extra tts --extra dev --universal --python-version 3.11 \
		--upgrade --quiet --no-header --no-emit-index-url --no-annotate \
		| grep -vE '^(nvidia-|cuda-|triton|flash-attn)' > requirements.lock.tmp
	mv requirements.lock.tmp requirements.lock
