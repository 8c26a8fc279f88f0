"""What the adapters' surroundings are told: the first step of an optimizer, and states without the base."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from transformers import Trainer, TrainingArguments

import frodctl
from frodctl import training
from frodctl.training.layer import FrodLinear
from frodctl.training.saving import trained_state
from tests.training.conftest import Cases, labelled
from tests.training.test_saving import Examples


def step(model: Any, optimizer: torch.optim.Optimizer, family: str = "llama") -> list[str]:
    """The warnings of a training step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**labelled(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


class TestTheRates:
    def test_one_for_both_is_told_once(self, cases: Cases) -> None:
        model = cases("llama").attached()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        (message,) = step(model, optimizer)
        assert "one learning rate (5e-05) for λ' and S" in message
        assert "frodctl.parameter_groups(model, steps=STEPS)" in message
        assert "optimizers=(optimizer, None)" in message
        assert "far too long" not in message
        assert step(model, optimizer) == []
        assert len(step(model, torch.optim.SGD(model.parameters(), lr=0.1))) == 1

    def test_one_far_beyond_what_trains_is_called_so(self, cases: Cases) -> None:
        """λ is about 1/√3 for three layers, so 1e-2 is a step of 1.7 % by it, and 2e-3 of less than 1 % by S."""
        for rate, is_far in ((1e-2, True), (2e-3, False)):
            model = cases("llama").attached()
            (message,) = step(model, torch.optim.AdamW(model.parameters(), lr=rate))
            assert ("far too long" in message) == is_far

    def test_groups_are_as_they_should_be(self, cases: Cases) -> None:
        model = cases("bert").attached()
        assert step(model, torch.optim.AdamW(frodctl.parameter_groups(model)), "bert") == []
        delta = [p for name, p in model.named_parameters() if name.endswith(".delta")]
        assert step(model, torch.optim.Adam(delta), "bert") == []

    def test_only_scales_or_another_model(self, cases: Cases) -> None:
        model = cases("llama").attached(sparsity=0)
        assert step(model, torch.optim.AdamW(model.parameters(), lr=1e-3)) == []
        other = nn.Linear(2, 2)
        other(torch.ones(1, 2)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.optim.SGD(other.parameters(), lr=0.1).step()

    def test_transformers_trainer(self, cases: Cases, tmp_path: Path) -> None:
        """Whose own optimizer has one rate."""
        model = cases("bert").attached()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        with pytest.warns(UserWarning, match=r"one learning rate \(5e-05\) for λ' and S"):
            Trainer(model, arguments, train_dataset=Examples()).train()

    def test_models_are_not_kept(self, cases: Cases) -> None:
        """torch's one hook holds neither a model nor an optimizer."""
        model = cases("llama").attached()
        optimizer = torch.optim.AdamW(frodctl.parameter_groups(model))
        step(model, optimizer)
        references = weakref.ref(model), weakref.ref(optimizer)
        hooks = len(optimizers._global_optimizer_pre_hooks)
        del model, optimizer
        gc.collect()
        assert [reference() for reference in references] == [None, None]
        cases("llama").attached()
        assert len(optimizers._global_optimizer_pre_hooks) == hooks == 1


class TestWithoutAGradient:
    def test_a_layer_that_the_loss_does_not_depend_on_is_named(self, cases: Cases) -> None:
        model = cases("llama").attached()
        model.model.layers[2].forward = lambda x, **_: x
        messages = step(model, torch.optim.AdamW(frodctl.parameter_groups(model)))
        assert len(messages) == 1
        assert messages[0].startswith("model.layers.2.self_attn.q_proj and 6 more: no gradient in the first step")

    def test_adapters_that_are_not_active_are_none_of_these(self, cases: Cases) -> None:
        case = cases("llama")
        model = frodctl.attach(case.attached(), case.basis, adapter_name="second")
        (message,) = step(model, torch.optim.AdamW(model.parameters()))
        assert "one learning rate" in message


class TestStatesWithoutTheBase:
    """The Trainer's checkpoints hold the trained numbers alone."""

    def test_nothing_is_missing(self, cases: Cases) -> None:
        case = cases("bert")
        model, fresh = case.trained(), case.attached()
        result = fresh.load_state_dict(trained_state(model))
        assert result.missing_keys == result.unexpected_keys == []
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))

    def test_what_should_be_there_is_missed(self, cases: Cases) -> None:
        model = cases("bert").attached()
        state = trained_state(model)
        name = next(iter(state))
        del state[name]
        assert model.load_state_dict(state, strict=False).missing_keys == [name]
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(state)
        whole = model.state_dict()
        bases = [name for name in whole if name.endswith("base_layer.weight")]
        for name in bases[:-1]:
            del whole[name]
        assert model.load_state_dict(whole, strict=False).missing_keys == bases[:-1]

    def test_as_before_when_it_is_detached(self, cases: Cases) -> None:
        model = training.detach(cases("llama").trained())
        assert not model._load_state_dict_post_hooks
        assert len(model.load_state_dict({}, strict=False).missing_keys) == len(model.state_dict())

    def test_resuming_is_quiet(self, cases: Cases, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def make() -> Any:
            model = cases("bert").attached()
            arguments = TrainingArguments(
                output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
            )
            optimizer = torch.optim.AdamW(frodctl.parameter_groups(model))
            return Trainer(model, arguments, train_dataset=Examples(), optimizers=(optimizer, None))

        make().train()
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        finally:
            logger.removeHandler(caplog.handler)
        assert "keys" not in caplog.text


def test_the_trainer_s_file_cannot_be_made_from_the_adapter(cases: Cases) -> None:
    """Why a checkpoint holds both: λ' = λ + δ in float32 does not have all the bits of δ."""
    model = cases("llama").trained()
    lost = 0
    for layer in (m for m in model.modules() if isinstance(m, FrodLinear)):
        update = layer.update()
        scales = (update.base_scales.double() + update.delta.double()).float()
        lost += int(((scales.double() - update.base_scales.double()).float() != update.delta).sum())
    assert lost > 100
