"""The figures of a shared basis: its condition, how layers share its directions, how exactly it gives the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from frodctl.adapted import opening
from frodctl.checkpoint import stream
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Checkpoint
from frodctl.errors import InvalidInput
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.jobs.inspect import columns, headers
from frodctl.jobs.inspect.matrices import Spectra, quantiles
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.resources import choose_device
from frodctl.method.dual import Dual

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

_QUANTILES = (0.05, 0.5, 0.95)


def basis_report(
    name: str, basis: BasisFile, options: InspectOptions, progress: Callback, profile: Unprofiled
) -> Report:
    """Rows with the figures of every V and every layer's scales; with a base also how it is reconstructed."""
    checkpoint = None
    if options.base is not None:
        location = options.location_of_other(options.base)
        checkpoint = open_checkpoint(location, progress=lambda text: progress(Progress(text)))
    if note := opening.without_digests(basis):
        progress(Progress(f"Warning: {note}."))
    figures = _BasisFigures(basis, checkpoint, options, profile)
    there = headers.basis_rows(basis)
    rows = [row for row in there if options.selects(row["name"])]

    def summary() -> dict[str, Json]:
        result = headers.basis_summary(basis, checkpoint.parameters() if checkpoint else None)
        for category in result["categories"]:
            category.update(figures.of_category(category["category"]))
        return result

    names = [row["name"] for row in there]
    return Report(name, "basis", columns.of_basis(options), figures.rows(rows), summary, len(rows), names)


class _BasisFigures:
    def __init__(
        self, basis: BasisFile, checkpoint: Checkpoint | None, options: InspectOptions, profile: Unprofiled
    ) -> None:
        self.basis = basis
        self.checkpoint = checkpoint
        self.spectra = Spectra(choose_device(options.device), profile)
        self.kernels = self.spectra.kernels
        self.conditions: dict[str, float | None] = {}
        self.records = {f"lambda.{record.name}": record for record in basis.metadata.modules}
        self._dual: tuple[str, Dual] | None = None  #: of the category last asked for

    def rows(self, rows: list[dict[str, Json]]) -> Iterator[Row]:
        for row in rows:
            yield self._row(row)

    def _row(self, row: dict[str, Json]) -> Row:
        kind = row["name"].partition(".")[0]
        if kind == "V":
            found = self.spectra.of(self.basis.tensor(row["name"]), row["name"])
            self.conditions[row["category"]] = found.values["condition_number"]
            return Row(row | found.values, found.singular_values)
        values = self.basis.tensor(row["name"]).astype(np.float64)
        more: dict[str, Json] = {}
        if kind in ("lambda", "tau") and len(values):
            more = dict(zip(("minimum", "median", "maximum"), quantiles(values, (0, 0.5, 1)), strict=True))
        if row["name"] in self.records and self.checkpoint is not None:
            more |= self._reconstruction(self.records[row["name"]], values)
        return Row(row | more)

    def of_category(self, category: str) -> dict[str, Json]:
        """cond(V), the range of τ, and quantiles of the number of layers that in effect share a direction.

        p_k = 1/Σ_i λ_ik⁴, between 1 and the number of layers; null directions left out.
        """
        tau = self.basis.tensor(f"tau.{category}")
        layers = [record for record in self.basis.metadata.modules if record.category == category]
        if not layers:
            return {}
        scales = [self.basis.tensor(f"lambda.{record.name}").astype(np.float64) for record in layers]
        fourth = np.sum([np.square(np.square(scale)) for scale in scales], axis=0)
        sharing = 1 / fourth[fourth > 0]
        if category not in self.conditions:
            V = self.basis.tensor(f"V.{category}")
            self.conditions[category] = self.spectra.of(V, f"V.{category}").values["condition_number"]
        return {
            "condition_number": self.conditions[category],
            "tau_min": float(tau[0]),
            "tau_max": float(tau[-1]),
            "null_directions": int((fourth == 0).sum()),
            "sharing_quantiles": dict(zip(("p05", "p50", "p95"), quantiles(sharing, _QUANTILES), strict=True)),
            "sharing": [round(value, 4) for value in sharing.tolist()],
        }

    def _reconstruction(self, record: ModuleRecord, scales: HostArray) -> dict[str, Json]:
        """How far U diag(λ) Vᵀ is from the base's weight, relative to it, and whether that is the recorded one."""
        W, digest = self._weight(record)
        dual = self._basis_of(record.category)
        kernels = self.kernels
        X = kernels.copy(W, kernels.empty(W.shape, "float64"))
        U = kernels.gemm(X, dual.inverse, kernels.empty(W.shape, "float64"), transpose_b=True)
        V = kernels.put(dual.V, "float64")
        U *= kernels.put(scales / np.maximum(kernels.norms(U, 0), 1e-300))
        whole = np.linalg.norm(kernels.norms(X, 1))
        error = np.linalg.norm(kernels.norms(kernels.gemm(U, V, X, transpose_b=True, beta=-1), 1))
        return {
            "reconstruction_error": float(error) / max(float(whole), 1e-300),
            "base_digest": "same" if digest == record.digest else "differs",
        }

    def _weight(self, record: ModuleRecord) -> tuple[HostArray, str]:
        """The base's weight (m, n), and the digest of its stored bytes."""
        assert self.checkpoint is not None
        assert self.checkpoint.root is not None
        module, _, index = record.name.removesuffix("]").partition("[")
        known = self.checkpoint.tensors
        info = known.get(f"{module}.weight") or known.get(module)
        if info is None or not (index.isdigit() or not index):
            raise InvalidInput(f"{self.checkpoint.model}: no weight of {record.name}, which {self.basis.path} is of")
        stored = stream.read_tensor(self.checkpoint.root, info.slice(int(index)) if index else info)
        if tuple(stored.shape) != record.shape:
            raise InvalidInput(
                f"{self.checkpoint.model}: {info.name} is {list(stored.shape)}, not {list(record.shape)}"
            )
        return stored.T if record.transposed else stored, stream.digest(stored)

    def _basis_of(self, category: str) -> Dual:
        if self._dual is None or self._dual[0] != category:
            self._dual = category, Dual.of(self.basis.tensor(f"V.{category}"), self.kernels)
        return self._dual[1]
