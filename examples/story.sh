#!/usr/bin/env bash
# The whole story on the example checkpoint: decompose, train, inspect, merge, run. About half a minute on two cores.
#
#     pip install -c constraints.txt '.[train]' && bash examples/story.sh [FOLDER [OPTION-OF-TRAIN.PY...]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
cd "$work"

frodctl decompose "$here/tiny-llama" --target-modules all-linear -o basis.safetensors --force
python "$here/train.py" "$here/tiny-llama" basis.safetensors adapter "${@:2}"
frodctl inspect adapter --base "$here/tiny-llama" --sort relative_change --top 3
frodctl merge "$here/tiny-llama" adapter merged --force
frodctl inspect merged --against "$here/tiny-llama" --sort relative_difference --top 3
python "$here/generate.py" merged "Return the"
