#!/usr/bin/env bash
# Makes $1, a virtual environment with the last LLaMA-Factory, TRL and transformers that run PPO together.
set -eu
place=${1:?usage: peer_ppo_setup.sh DIRECTORY}
here=$(cd "$(dirname "$0")" && pwd)
python3 -m venv "$place"
"$place/bin/pip" install -q -U pip
"$place/bin/pip" install -q torch==2.13.0 # first and alone, so that the machine's own build is taken
"$place/bin/pip" install -q -c "$here/peer_ppo_constraints.txt" llamafactory==0.9.3
"$place/bin/pip" check || true # LLaMA-Factory's own bounds are narrower; its check is switched off
cd "$place" # elsewhere a folder named ray would be taken for the package
DISABLE_VERSION_CHECK=1 "$place/bin/python" -c "import llamafactory.train.tuner"
