"""TRL's trainers, where it is installed: each by the shortest script."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import frodctl
from frodctl.training import disabled

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.long
STEPS = 3
OPTIONS = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


@pytest.fixture
def attached(example: Path, tmp_path: Path) -> Any:
    frodctl.decompose(example, tmp_path / "basis.safetensors", target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32)
    return frodctl.attach(model, tmp_path / "basis.safetensors")


def trained(kind: Any, arguments: Any, model: Any, example: Path, rows: dict[str, list[str]]) -> Any:
    """The trainer, after its steps."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(example)
    optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, steps=STEPS))
    data = Dataset.from_dict(rows)
    options = {"train_dataset": data, "processing_class": tokenizer, "optimizers": (optimizer, None)}
    trainer = kind(model, args=arguments, **options)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_sft(attached: Any, example: Path, tmp_path: Path) -> None:
    arguments = trl.SFTConfig(str(tmp_path / "run"), **OPTIONS, **CPU)
    trainer = trained(trl.SFTTrainer, arguments, attached, example, {"text": ["one and the same"] * 8})
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = AutoModelForCausalLM.from_pretrained(example, dtype=torch.float32)
    loaded = frodctl.load_adapter(fresh, tmp_path / "adapter", tmp_path / "basis.safetensors")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, attached.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_dpo(attached: Any, example: Path, tmp_path: Path) -> None:
    """The model is its own reference before the first step, where the loss is ln 2, and later with adapters off."""
    arguments = trl.DPOConfig(str(tmp_path / "run"), precompute_ref_log_probs=True, **OPTIONS, **CPU)
    rows = {"prompt": ["one"] * 8, "chosen": [" two"] * 8, "rejected": [" three"] * 8}
    trainer = trained(trl.DPOTrainer, arguments, attached, example, rows)
    assert trainer.ref_model is None
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    row = trainer.train_dataset[0]
    prompt, chosen = row["prompt_ids"], torch.tensor(row["chosen_ids"])
    with disabled(attached), torch.no_grad():
        logits = attached.eval()(torch.tensor([[*prompt, *row["chosen_ids"]]])).logits[0, len(prompt) - 1 : -1]
    reference = logits.log_softmax(-1).gather(1, chosen[:, None]).sum()
    assert float(reference) == pytest.approx(row["ref_chosen_logps"], rel=1e-5)
