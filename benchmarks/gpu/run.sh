#!/usr/bin/env bash
# run.sh OUT [--quick] [--only PART ...]   the GPU benchmarks; results go to the folder OUT as they end
# run.sh --fetch [PACKAGE ...]             wheels for a machine without a network, into wheels/ beside this file
#
# The machine needs Python 3.12 and torch (2.11 or newer, for its CUDA). What else is missing comes from
# wheels/*.whl, which are unpacked into a temporary folder; nothing is installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
if [ "${1:-}" = --fetch ]; then
  mkdir -p "$here/wheels"
  exec "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$here/wheels" \
    megatron-core==0.19.2 packaging pyyaml safetensors "${@:2}"
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$here"/wheels/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site"
done
# What the machine has comes first: a wheel here may be older, or for another Python.
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" LONGROPE_WHEELS="$site"
"$python" "$here/run.py" "$@"
