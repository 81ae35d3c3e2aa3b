#!/usr/bin/env bash
# Install detectron2 and what the integration needs into the environment of a Python that has torch.
#
#   scripts/install_detectron2.sh               the official sources at a fixed commit, compiled (git and a C++ compiler; minutes)
#   scripts/install_detectron2.sh --from-pypi   a third party's re-upload to PyPI, its hash pinned, nothing compiled (seconds)
#
# PYTHON names the interpreter, `python3` by default. docs/detectron2.md says when which is right.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# the last official commit whose Cityscapes code runs outside of its authors' company
commit=c69939aa85460e8135f40bce908a6cddaa73065f
# Python files of official a59f0563 (2024-04-17); its one compiled file is for another Python, so that detectron2 takes its fallbacks
reupload="sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"

if ! "$python" -W ignore -c "import torch" 2>/dev/null; then
    echo "install_detectron2: $python has no torch; install it first (python -m pip install torch)" >&2
    exit 2
fi
if [ $# -gt 1 ] || { [ $# -eq 1 ] && [ "$1" != --from-pypi ]; }; then
    echo "install_detectron2: unknown arguments: $*; expected none, or --from-pypi" >&2
    exit 2
fi

"$python" -m pip install --disable-pip-version-check --quiet -c constraints-detectron2.txt -e ".[detectron2]"
if [ "${1:-}" = --from-pypi ]; then
    requirements=$(mktemp)
    trap 'rm -f "$requirements"' EXIT
    echo "$reupload" >"$requirements"
    # the wheel says Python 3.10, and pip takes a wheel of another Python into a named folder only
    "$python" -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps --upgrade --only-binary=:all: \
        --python-version 3.10 --implementation cp --abi none --platform any \
        --target "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" -r "$requirements"
else
    "$python" -m pip install --disable-pip-version-check -c constraints-detectron2.txt ninja wheel
    # its setup.py imports torch
    "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
        "git+https://github.com/facebookresearch/detectron2.git@$commit"
fi
"$python" -c "import emca_bench.integrations.detectron2" && echo "detectron2 is ready"
