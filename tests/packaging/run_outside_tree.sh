#!/usr/bin/env bash
# Runs tests against an installed tlkernels. They are copied to an empty folder first, so that nothing of the source
# tree can be imported by accident. Paths of tests are relative to the root.
#
#     run_outside_tree.sh PYTHON [PYTEST ARGUMENTS...]
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift

: "${TLKERNELS_BUILD_DIR:=$(echo "$root"/build/release-cpython-*)}" # where test_symbols.py finds the kernels' objects
export TLKERNELS_BUILD_DIR

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
# csrc: a test compiles a CUDA kernel for the host. constraints.txt: one installs packages.
cp -r "$root"/{constraints.txt,csrc,pyproject.toml,tests} "$outside"
cd "$outside"
"$python" -m pytest -p no:cacheprovider "$@"
