#!/usr/bin/env bash
# Installs what wheelhouse/ holds as users do, into an empty environment, and runs tests there, outside the source tree.
# Then the same with the package built with TLKERNELS_NO_EXT=1.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
builder=$root/.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python

install() { "$python" -m pip --disable-pip-version-check install -q -c constraints.txt "$@"; }
run() { OMP_NUM_THREADS=1 bash tests/packaging/run_outside_tree.sh "$python" -n 2 "$@"; }

echo "--- the wheel"
TLKERNELS_WHEEL=$(echo "$root"/wheelhouse/tlkernels-*.whl)
export TLKERNELS_WHEEL
install torch==2.13.0
install "tlkernels[test] @ file://$TLKERNELS_WHEEL"
TLKERNELS_REQUIRE=cpu run tests/ops tests/packaging/test_wheel.py tests/packaging/test_symbols.py \
    tests/packaging/test_torch_free.py

echo "--- the package built with TLKERNELS_NO_EXT=1"
TLKERNELS_NO_EXT=1 "$builder" -m build --wheel --no-isolation --outdir "$folder/pure" >"$folder/log" 2>&1 ||
    { cat "$folder/log" && exit 1; }
TLKERNELS_WHEEL=$(echo "$folder"/pure/tlkernels-*.whl)
install --force-reinstall --no-deps "$TLKERNELS_WHEEL"
run tests/ops/test_nf4.py tests/packaging/test_wheel.py -k "reference or wheel"
