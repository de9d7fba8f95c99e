#!/usr/bin/env bash
# What only a GPU can show, in one command and at most 8 minutes: bench/gpu.py says what it does.
#     bash bench/gpu.sh                                        one GPU with 80 GB
#     bash bench/gpu.sh --device cpu --sizes tiny --quick      the same parts, as small as they get
# It uses the Python that is there (or $PYTHON), installs nothing and downloads nothing.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_NVML_BASED_CUDA_CHECK=1
exec "${PYTHON:-python3}" bench/gpu.py "$@"
