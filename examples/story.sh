#!/usr/bin/env bash
# The whole story on the example checkpoint: decompose, train, inspect, merge, run. About half a minute on two cores.
#
#     pip install -c constraints.txt '.[test]' && bash examples/story.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
cd "$work"

frodctl decompose "$here/tiny-llama" --target-modules all-linear -o basis.safetensors --force
python "$here/train.py" "$here/tiny-llama" basis.safetensors adapter
frodctl inspect adapter --base "$here/tiny-llama" --basis basis.safetensors --sort relative_change --top 3
frodctl merge "$here/tiny-llama" adapter merged --basis basis.safetensors --force
frodctl inspect merged --against "$here/tiny-llama" --sort relative_difference --top 3
python - <<'PYTHON'
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("merged")
model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
ids = model.generate(**tokenizer("Return the", return_tensors="pt"), max_new_tokens=24, do_sample=False)
print(tokenizer.decode(ids[0]))
PYTHON
