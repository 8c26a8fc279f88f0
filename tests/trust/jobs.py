"""A tiny model, and the jobs over it that are made to fail, killed and cut from power."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import frodctl
from frodctl.formats import adapter as adapter_format

Content = dict[str, bytes | None]


def content(path: Path) -> Content:
    """The bytes of a file, or of all below a folder; None for folders."""
    if not path.is_dir():
        return {"": path.read_bytes()} if path.exists() else {}
    paths = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in paths}


@dataclass(frozen=True)
class Job:
    """What is run in a folder that holds ``inputs/``, with the output ``out``."""

    name: str
    home: Path  #: inputs, which no run may change
    output: str
    run: Callable[[Path], object]
    expected: Content
    before: Content  #: what was there, where the output takes the place of something

    def prepare(self, folder: Path) -> None:
        """An empty folder, but for what the output is to replace."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder / self.output, self.before)


def write(path: Path, wanted: Content) -> None:
    if "" in wanted:
        path.write_bytes(wanted[""] or b"")
    elif wanted:
        path.mkdir()
        for name, data in wanted.items():
            (path / name).mkdir() if data is None else (path / name).write_bytes(data)


def make_inputs(home: Path) -> None:
    """A sharded Llama of two layers with what comes with a model, its basis, and an adapter that changes it."""
    base = home / "base"
    (base / "1_Pooling").mkdir(parents=True)
    random = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    names = {f"model.layers.{layer}.{role}.weight": shape for layer in range(2) for role, shape in shapes.items()}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    tensors["model.embed_tokens.weight"] = random.standard_normal((16, 8)).astype(np.float32)
    save(base / "model.safetensors", tensors)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    (base / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        (base / name).write_text("{}")
    frodctl.decompose(base, home / "basis.safetensors", target_modules="all-linear", sparsity=0.1)
    make_adapter(home / "adapter", home / "basis.safetensors")


def save(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    with path.open("wb") as file:
        adapter_format.write_tensors(file, tensors)


def make_adapter(folder: Path, basis_file: Path) -> None:
    basis = frodctl.open_basis(basis_file)
    random = np.random.default_rng(1)
    tensors = {}
    for record in basis.metadata.modules:
        scales = basis.tensor(f"lambda.{record.name}")
        nnz = basis.indices()[record.category].shape[1]
        changed = scales * (1 + 0.1 * random.standard_normal(scales.shape))
        tensors[adapter_format.lambda_key(record.name)] = changed.astype(np.float32)
        tensors[adapter_format.values_key(record.name)] = random.standard_normal(nnz).astype(np.float32) / 10
    provenance = adapter_format.Provenance(
        form="delta",
        V_digests=basis.metadata.V_digests,
        base_digests={record.name: record.digest for record in basis.metadata.modules},
        seed=basis.metadata.seed,
        sparsity=basis.metadata.sparsity,
        categories={},
        pattern={},
        dtype={},
    )
    config = {"base_model_name_or_path": "base"}
    adapter_format.write_adapter(folder, tensors, config, provenance, "# An adapter\n")


def jobs(home: Path) -> dict[str, Job]:
    """The jobs by name, run once each for what they are to make."""
    base, basis, adapter = home / "base", home / "basis.safetensors", home / "adapter"

    def decompose(folder: Path, alpha: float = 1e-3, force: bool = False) -> None:
        out = folder / "out.safetensors"
        frodctl.decompose(base, out, target_modules="all-linear", sparsity=0.1, alpha=alpha, force=force)

    def merge(folder: Path, scale: float = 1.0, **options: Any) -> None:
        frodctl.merge(base, adapter, folder / "out", basis=basis, scale=scale, max_shard_size=1000, **options)

    runs: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object] | None]] = {
        "decompose": ("out.safetensors", decompose, None),
        "decompose over another": (
            "out.safetensors",
            lambda folder: decompose(folder, force=True),
            lambda folder: decompose(folder, alpha=1e-2),
        ),
        "merge": ("out", merge, None),
        "merge over another": (
            "out",
            lambda folder: merge(folder, force=True),
            lambda folder: merge(folder, scale=0.5),
        ),
        "merge as LoRA": ("out", lambda folder: merge_lora(folder), None),
    }

    def merge_lora(folder: Path) -> None:
        frodctl.merge(base, adapter, folder / "out", basis=basis, as_="lora", rank=2)

    made = {}
    for name, (output, run, before) in runs.items():
        folder = home / "expected"
        folder.mkdir()
        old: Content = {}
        if before is not None:
            before(folder)
            old = content(folder / output)
        run(folder)
        made[name] = Job(name, home, output, run, content(folder / output), old)
        shutil.rmtree(folder)
    return made
