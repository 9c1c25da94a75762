#!/usr/bin/env bash
# The libraries that `python -m benchmarks.inner_loop` measures beside metadist, into build/peers: only their own
# processes look there, so that what they need clashes with nothing, and all run on the same torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
pip() { "${PYTHON:-.venv/bin/python}" -m pip --quiet --disable-pip-version-check "$@"; }
rm -rf build/peers
pip install --no-deps --target build/peers higher==0.2.1 torchopt==0.7.3 optree==0.20.0 graphviz==0.21

# learn2learn 0.2.0 does not build on today's Python, for its data sets' sake; its MAML needs no building.
pip download --no-deps --no-binary learn2learn --dest build/peers/source learn2learn==0.2.0
tar -xzf build/peers/source/learn2learn-0.2.0.tar.gz -C build/peers --strip-components=1 learn2learn-0.2.0/learn2learn
echo "learn2learn 0.2.0, higher 0.2.1 and TorchOpt 0.7.3 are in build/peers"
