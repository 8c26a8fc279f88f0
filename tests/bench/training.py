"""A training step with frodctl, with PEFT's FRoD and with PEFT's LoRA: tokens per second and peak memory.

    python tests/bench/training.py [--repeats 3] [--tokens 768 3072]

A Llama of 4 layers, hidden size n = 768, in float32 with random weights; every linear layer is trained, FRoD at
sparsity 0.01, LoRA at rank 16. Each measurement is a process of its own, in turns: it makes the model, takes one step
to warm up, then reports the median of five steps (forward, backward, Adam).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
from checkpoints import SMOLLM2_135M, make_llama
from process import printed_in_turns

import frodctl

LAYERS = 4
HIDDEN = 768
STEP = """
import json, re, statistics, sys, time, torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
method, folder, basis, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
if method == "frodctl":
    import frodctl
    frodctl.attach(model, basis)
elif method == "PEFT FRoD":
    from frodctl.training.peft import get_peft_model
    model = get_peft_model(model, basis)
elif method == "PEFT LoRA":
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
model.train()
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
length = min(tokens, 256)
ids = torch.randint(0, 1000, (tokens // length, length), generator=torch.Generator().manual_seed(0))
seconds = []
for step in range(6):
    began = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - began)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([statistics.median(seconds[1:]), peak]))
"""
METHODS = ("frodctl", "PEFT FRoD", "PEFT LoRA", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[HIDDEN, 4 * HIDDEN])
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print("| tokens a step | method | tokens/s, median (min–max) | peak memory | speed / PEFT FRoD |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
        config = SMOLLM2_135M | sizes | {"num_hidden_layers": LAYERS, "vocab_size": 1024}
        model, basis = make_llama(Path(work, "model"), config), Path(work, "basis.safetensors")
        frodctl.decompose(str(model), basis, target_modules="all-linear")
        for tokens in arguments.tokens:
            cases = {method: [method, str(model), str(basis), str(tokens)] for method in METHODS}
            found = printed_in_turns(STEP, cases, arguments.repeats)
            for method in METHODS:
                rates = [tokens / seconds for seconds, _ in found[method]]
                ratios = [p[0] / s[0] for s, p in zip(found[method], found["PEFT FRoD"], strict=True)]
                peak = statistics.median(memory for _, memory in found[method])
                print(
                    f"| {tokens} | {method} | {statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f}) "
                    f"| {peak:.0f} MB | {statistics.median(ratios):.2f}× |"
                )


if __name__ == "__main__":
    main()
