"""The line that says how much is trained."""

from __future__ import annotations

import peft
import pytest
from torch import nn

from frodctl import training
from frodctl.errors import UsageError
from tests.training.conftest import Cases


def test_in_peft_s_words(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    model = cases("llama").attached()
    trained, total = training.trainable_parameters(model)
    training.print_trainable_parameters(model)
    ours = capsys.readouterr().out
    assert (
        ours == f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}\n"
    )
    peft.get_peft_model(cases("llama").model(), peft.LoraConfig(target_modules=["q_proj"])).print_trainable_parameters()
    theirs = capsys.readouterr().out
    assert [part.split(":")[0] for part in ours.split("||")] == [part.split(":")[0] for part in theirs.split("||")]


def test_without_an_adapter_and_without_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    training.print_trainable_parameters(nn.Linear(3, 4))
    training.print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out.splitlines() == [
        "trainable params: 16 || all params: 16 || trainable%: 100.0000",
        "trainable params: 0 || all params: 0 || trainable%: 0.0000",
    ]


def test_what_is_no_model() -> None:
    with pytest.raises(UsageError, match="`model`"):
        training.print_trainable_parameters("gpt2")
