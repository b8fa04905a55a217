"""Bases: the directions of the inputs of linear layers that an arm protects, from the texts that are to be kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import eigh
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import FunctionalNetworkConfig, discover_networks, find_neuron_sites
from fnsft_trl.discovery.directions import KeptDirections, KeptText, orthonormal
from fnsft_trl.discovery.inputs import batches_of, run_taps
from fnsft_trl.errors import FNSFTError
from fnsft_trl.template.template import FunctionalNetworkTemplate
from fnsft_trl.writing import one_writer, written_whole

from .plan import COMPONENTS, DIRECTIONS, DOMAINS, KEPT_TOKENS, PIECE
from .texts import MAX_LENGTH, kept_rows


Basis = Mapping[
    str, torch.Tensor
]  # name of a linear module -> orthonormal columns, shape (width, directions), float64

_RIDGE = 1e-3  # of the mean eigenvalue, added to the moment that another one is compared with


class Bases:
    """Finds bases once and keeps them.

    Args:
        model: directory of the model.
        folder: where they are kept.
        device: where they are found.
    """

    def __init__(self, model: str, folder: Path, device: str = "cpu") -> None:
        self.path = model
        self.folder = folder
        self.device = device
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        rows = {name: kept_rows(name, self._tokenizer, KEPT_TOKENS // len(DOMAINS)) for name in DOMAINS}
        self.rows = rows
        digest = hashlib.sha256(repr((rows, DIRECTIONS, COMPONENTS, KEPT_TOKENS)).encode()).hexdigest()
        self._mark = digest[:12]

    def texts(self) -> dict[str, KeptText]:
        """The texts to keep, by name."""
        return {
            name: KeptText([self._tokenizer(row)["input_ids"][:MAX_LENGTH] for row in rows])
            for name, rows in self.rows.items()
        }

    def pieces_file(self) -> Path:
        """All of them in pieces of 64 tokens, as a file of rows of text."""
        path = self.folder / f"pieces-{self._mark}.jsonl"
        if not path.exists():
            whole = [ids for text in self.texts().values() for ids in text.sequences]
            pieces = [ids[start : start + PIECE] for ids in whole for start in range(0, len(ids), PIECE)]
            rows = [json.dumps({"text": self._tokenizer.decode(piece)}) + "\n" for piece in pieces if len(piece) > 1]
            with written_whole(path) as scratch:
                scratch.write_text("".join(rows), encoding="utf-8")
        return path

    def subspace(self, seed: int) -> Basis:
        """Position 0, mean and leading directions, of every input."""
        found = self._kept("subspace", self._subspace)
        return {name: found[_reader(name)] for name in found}

    def random(self, seed: int) -> Basis:
        """As many directions of every input, drawn by a seed; inputs that modules share are given one draw."""
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[str, torch.Tensor] = {}
        subspace = self.subspace(seed)
        for name, basis in sorted(subspace.items()):
            if _reader(name) == name:
                drawn[name] = torch.linalg.qr(torch.randn(basis.shape, generator=generator, dtype=torch.float64)).Q
        return {name: drawn[_reader(name)] for name in subspace}

    def networks(self, directions: int) -> Basis:
        """As the subspace; at the inputs of the down projections position 0, mean, and networks of most energy."""
        subspace = self.subspace(0)
        loadings, energies = self.components("networks")
        most = sum(energies.values()).argsort(descending=True)[:directions]
        return {
            name: orthonormal(basis[:, :2], loadings[name][most].T) if name in loadings else basis
            for name, basis in subspace.items()
        }

    def of_domain(self, kind: str, domain: str, directions: int) -> Basis:
        """The directions of one domain at the inputs of the down projections, by the rule of the plan.

        Args:
            kind: `networks`, `pca` or `ceiling`.
            domain: `wikipedia` or `docs`.
            directions: how many.
        """
        if kind == "ceiling":
            whole = self._kept("ceiling", self._ceiling)
            first = domain == DOMAINS[0]
            chosen = {name: v[:, :directions] if first else v[:, -directions:] for name, v in whole.items()}
            return {name: orthonormal(vectors) for name, vectors in chosen.items()}
        loadings, energies = self.components(kind)
        ratio = energies[DOMAINS[0]].log() - energies[DOMAINS[1]].log()
        order = ratio.argsort(descending=domain == DOMAINS[0])[:directions]
        return {name: orthonormal(vectors[order].T) for name, vectors in loadings.items()}

    def components(self, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loadings of a decomposition of both texts together, and how much energy each component has in either.

        Args:
            kind: `networks` or `pca`.

        Returns:
            Down projection -> shape (components, neurons); name of a text -> shape (components,).
        """
        found = self._kept(f"components-{kind}", lambda model: self._components(model, kind))
        prefix = "energy of "
        loadings = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
        return loadings, {name: found[prefix + name] for name in DOMAINS}

    def _kept(self, name: str, find: Callable[[nn.Module], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        path = self.folder / f"{name}-{self._mark}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        with one_writer(path.with_suffix(".lock")):  # other processes at work on cells wait
            if not path.exists():
                model = AutoModelForCausalLM.from_pretrained(self.path, dtype="float32").to(self.device).eval()
                found = find(model)
                with written_whole(path) as scratch:
                    save_file({key: tensor.contiguous().cpu() for key, tensor in found.items()}, scratch)
        return load_file(path)

    def _subspace(self, model: nn.Module) -> dict[str, torch.Tensor]:
        names = linear_modules(model)
        found = KeptDirections.find(model, names, self.texts(), leading=DIRECTIONS, title=None)
        return {name: found.of(name).basis.clone() for name in names}

    def _components(self, model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
        config = FunctionalNetworkConfig(
            ica_components=COMPONENTS,
            ica_max_tokens=KEPT_TOKENS,
            ica_max_length=MAX_LENGTH,
            ica_decomposition="ica" if kind == "networks" else kind,
        )
        rows = [row for of_text in self.rows.values() for row in of_text]
        template: FunctionalNetworkTemplate = discover_networks(model, self._tokenizer, rows, config)
        loadings = {site.down_name: template.loadings[site.layer].double() for site in find_neuron_sites(model)}
        norms = sum(vectors.square().sum(1) for vectors in loadings.values()).sqrt()
        loadings = {name: vectors / norms[:, None] for name, vectors in loadings.items()}
        energies = {f"energy of {name}": joint_energy(model, loadings, text) for name, text in self.texts().items()}
        return loadings | energies

    def _ceiling(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Generalised eigenvectors of the two second moments, those of the first text first; none is unit."""
        moments = [second_moments(model, text) for text in self.texts().values()]
        found = {}
        for name in tqdm(moments[0], "ceiling", disable=None):
            first, second = (each[name].numpy() for each in moments)
            ridge = _RIDGE * (first.trace() + second.trace()) / 2 / len(first)
            identity = torch.eye(len(first), dtype=torch.float64).numpy()
            vectors = eigh(first + ridge * identity, second + ridge * identity)[1][:, ::-1]
            found[name] = torch.from_numpy(vectors.copy())
        return found


_READERS = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj"}


def _reader(name: str) -> str:
    """The first of the modules that read the same input: gate and up do, and query, key and value."""
    block, _, last = name.rpartition(".")
    return f"{block}.{_READERS.get(last, last)}"


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear modules of the layers."""
    return [name for name, _ in model.named_modules() if name.endswith("_proj")]


def joint_energy(model: nn.Module, loadings: Mapping[str, torch.Tensor], text: KeptText) -> torch.Tensor:
    """Mean square of what all inputs together have along each component, over the tokens of a text.

    Args:
        model: the base.
        loadings: module -> shape (components, width): a component is a vector over all of them, of norm 1.
        text: the text; the first token of each sequence is left out.

    Returns:
        Shape (components,), float64.
    """
    groups = [(name,) for name in loadings]
    total, tokens = 0.0, 0
    for inputs, _, others in batches_of(text.sequences, 8):
        scores: list[torch.Tensor] = []

        def read(group: tuple[str, ...], rows: torch.Tensor, others=others, scores=scores) -> None:
            scores.append(rows[others].double() @ loadings[group[0]].to(rows.device).T)

        run_taps(model, groups, inputs, read)
        total = total + sum(scores).square().sum(0).cpu()
        tokens += len(others)
    return total / tokens


def second_moments(model: nn.Module, text: KeptText) -> dict[str, torch.Tensor]:
    """Uncentred second moment of the input of every down projection, shape (width, width), float64.

    Args:
        model: the base.
        text: the text; the first token of each sequence is left out.
    """
    names: Sequence[str] = [site.down_name for site in find_neuron_sites(model)]
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    for inputs, _, others in batches_of(text.sequences, 8):

        def read(group: tuple[str, ...], rows: torch.Tensor, others=others) -> None:
            sums[group[0]] = sums[group[0]] + rows[others].T @ rows[others]

        run_taps(model, [(name,) for name in names], inputs, read)
        tokens += len(others)
    if not tokens:
        raise FNSFTError("a text to keep has no tokens; give some sentences")
    return {name: total.cpu().double() / tokens for name, total in sums.items()}
