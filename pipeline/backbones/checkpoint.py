"""Read a backbone's safetensors by the names of the model's parameters, and only the slices that are asked for.

A checkpoint keeps a routed expert as three matrices, the model as slices of two stacked tensors, and some parts are
called differently in both (`families.RoutedBlock`). So every tensor of the model is a list of pieces here: runs of rows
of saved tensors, in the order of the flattened model tensor.

Legend: E routed experts, D model width, F width of one routed expert.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from data_contracts.errors import UserError
from pipeline.backbones.families import Family

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Saved:
    """One tensor of one file, as its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it


@dataclass(frozen=True)
class _Piece:
    """All rows of a saved tensor, or of one entry of its first dimension."""

    saved: _Saved
    entry: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.saved.shape if self.entry is None else self.saved.shape[1:]

    @property
    def row(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the model: its whole shape, and its pieces in flattened order, equally many for every expert."""

    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]
    stacked: bool = False  # the first dimension counts experts


class Checkpoint:
    """The tensors of a backbone folder under the names they have in the stock transformers model.

    Only headers are read at first. `bytes_read` counts the bytes of the tensor slices asked for since then, in the
    files' own dtype. One file at a time is mapped into memory.

    Raises UserError for what no model could be loaded from: tensors of other than floating dtypes, the same tensor
    twice, an expert of which a matrix is missing.
    """

    def __init__(self, folder: str | Path, family: Family, config: PreTrainedConfig) -> None:
        self.folder = Path(folder)
        self.family = family
        self.bytes_read = 0
        self._config = config
        self._mapped: tuple[Path, safe_open] | None = None
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # the model computes its rotary frequencies; old checkpoints hold them too
        patterns = [r"rotary_emb\.inv_freq$", *(model_class._keys_to_ignore_on_load_unexpected or ())]
        self._ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
        self._tied: dict[str, str] = {}
        if config.tie_word_embeddings:
            self._tied = dict(model_class._tied_weights_keys or {})
        self._tensors = self._index()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the checkpoint against the model's tensors: {name: whole shape}, tied ones under either name or both.

        Raises UserError naming tensor, file and remedy for one that is missing, has another shape, or is left over.
        """
        wanted = {self._saved_name(name): tuple(shape) for name, shape in shapes.items()}
        for name, shape in wanted.items():
            found = self._find(name)
            if found.shape != shape:
                raise self._error(
                    f"tensor '{name}' has shape {list(found.shape)} in {found.pieces[0].saved.file.name}, "
                    f"the model of its config.json {list(shape)}; keep config.json and weights of one model there"
                )
        left = [name for name in self._tensors if name not in wanted]
        for name in left:
            other = self._other_end(name)
            if other in wanted and self._same(name, other):
                continue
            saved = self._tensors[name].pieces[0].saved
            raise self._error(
                f"{saved.file.name} holds '{saved.name}', which the model of its config.json has no place for "
                f"({len(left)} such tensors); keep config.json and weights of one model there"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of a tensor of the model, all experts counted."""
        return self._find(self._saved_name(name)).shape

    @torch.no_grad()
    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        expert_slice: tuple[int, int] | None = None,
        flat: tuple[int, int] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A tensor of the model, or a part of it; only the rows that the part touches are read.

        Args:
            name: of the parameter or buffer in the stock model, such as `model.layers.3.mlp.experts.gate_up_proj`.
            dtype: of the result; None keeps the file's.
            expert_slice: (first, stop): these experts alone, for a tensor that is stacked by experts.
            flat: (start, stop): this range of the flattened (and cut to the experts) tensor; the result is 1-D.
            out: contiguous tensor, on any device, of the result's number of elements, which is filled and returned;
                `dtype` is then its own.

        Raises UserError naming the tensor where the checkpoint has none.
        """
        tensor = self._find(self._saved_name(name))
        shape, pieces = tensor.shape, tensor.pieces
        if expert_slice is not None:
            first, stop = expert_slice
            if not (tensor.stacked and 0 <= first < stop <= shape[0]):
                raise AssertionError(f"{name} {shape} has no experts {first} to {stop}")
            each = len(pieces) // shape[0]
            shape, pieces = (stop - first, *shape[1:]), pieces[first * each : stop * each]
        start, stop = flat if flat is not None else (0, math.prod(shape))
        if not 0 <= start <= stop <= math.prod(shape):
            raise AssertionError(f"{name} {shape} has no elements {start} to {stop}")
        if out is None:
            out = torch.empty(stop - start, dtype=dtype or _DTYPES[pieces[0].saved.dtype])
            out = out if flat is not None else out.view(shape)
        into, at, filled = out.view(-1), 0, 0
        if into.numel() != stop - start:
            raise AssertionError(f"{name}: {stop - start} elements do not fit into {into.numel()}")
        for piece in pieces:
            low, high = max(start - at, 0), min(stop - at, piece.numel)
            at += piece.numel
            if low < high:
                into[filled : filled + high - low].copy_(self._elements(piece, low, high))
                filled += high - low
        return out

    def _elements(self, piece: _Piece, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of a flattened piece: a view of the mapped file."""
        top, bottom = low // piece.row, -(-high // piece.row)
        saved = self._open(piece.saved.file).get_slice(piece.saved.name)
        rows = saved[top:bottom] if piece.entry is None else saved[piece.entry, top:bottom]
        self.bytes_read += rows.numel() * rows.element_size()
        return rows.reshape(-1)[low - top * piece.row : high - top * piece.row]

    def _open(self, file: Path):
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None  # the old mapping goes before the new one comes
            self._mapped = (file, safe_open(file, framework="pt"))
        return self._mapped[1]

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise self._error(f"tensor '{name}' is in none of its *.safetensors; fetch the backbone again")
        return self._tensors[name]

    def _saved_name(self, name: str) -> str:
        """The name a tied tensor is saved under."""
        return name if name in self._tensors else self._other_end(name) or name

    def _other_end(self, name: str) -> str | None:
        """The tensor that this one is tied to, if the checkpoint holds it."""
        ends = [b if name == a else a for a, b in self._tied.items() if name in (a, b)]
        return next((end for end in ends if end in self._tensors), None)

    def _same(self, name: str, other: str) -> bool:
        """Whether two tied tensors are equal, as they must be where both are saved."""
        first, second = (self._tensors[n].pieces[0] for n in (name, other))
        count, self.bytes_read = self.bytes_read, 0
        mine = self._elements(first, 0, first.numel) if first.shape == second.shape else None
        equal = mine is not None and torch.equal(mine, self._elements(second, 0, second.numel))
        self.bytes_read = count
        if not equal:
            raise self._error(
                f"its config.json ties '{name}' to '{other}', but both are saved and differ; "
                "set tie_word_embeddings to false there"
            )
        return True

    def _index(self) -> dict[str, _Tensor]:
        """{name in the model: tensor} for all files."""
        plain: dict[str, _Saved] = {}
        experts: dict[str, dict[tuple[int, int], _Saved]] = {}  # of a stacked tensor, by expert and part
        twice: Counter[str] = Counter()
        for saved in self._headers():
            name = saved.name
            if self._ignored.search(name):
                continue
            if saved.dtype not in _DTYPES:
                raise self._error(
                    f"tensor '{name}' in {saved.file.name} is of dtype {saved.dtype}; "
                    f"use a checkpoint that is not quantised ({', '.join(_DTYPES)})"
                )
            name, place = self._model_name(name)
            twice[f"{name}{place or ''}"] += 1
            if place is None:
                plain[name] = saved
            else:
                experts.setdefault(name, {})[place] = saved
        again = [name for name, count in twice.items() if count > 1] + sorted(plain.keys() & experts)
        if again:
            raise self._error(f"tensor '{again[0]}' is saved more than once; remove the files that do not belong there")
        stacked = self.family.routed.experts if self.family.routed else None
        tensors = {}
        for name, saved in plain.items():
            if stacked and len(saved.shape) == 3 and f".{stacked}." in name:
                pieces = tuple(_Piece(saved, expert) for expert in range(saved.shape[0]))
                tensors[name] = _Tensor(saved.shape, pieces, stacked=True)
            else:
                tensors[name] = _Tensor(saved.shape, (_Piece(saved),))
        return tensors | {name: self._stack(name, parts) for name, parts in experts.items()}

    def _model_name(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """The model's name for a saved one, and (expert, part) where it is a part of a stacked tensor."""
        routed = self.family.routed
        if routed is None:
            return name, None
        for there, here in routed.renamed:
            name = name.replace(there, here)
        gate, up, down = routed.saved_experts
        found = re.fullmatch(rf"(.+\.{routed.experts})\.(\d+)\.({gate}|{up}|{down})\.weight", name)
        if found is None:
            return name, None
        block, expert, part = found.groups()
        if part == down:
            return f"{block}.down_proj", (int(expert), 0)
        return f"{block}.gate_up_proj", (int(expert), (gate, up).index(part))

    def _stack(self, name: str, parts: Mapping[tuple[int, int], _Saved]) -> _Tensor:
        """(E, 2F, D) of gate and up matrices, each (F, D), or (E, D, F) of down matrices."""
        each = 2 if name.endswith(".gate_up_proj") else 1
        total = 1 + max(expert for expert, _ in parts)
        example = next(iter(parts.values()))
        pieces = []
        for place in ((expert, part) for expert in range(total) for part in range(each)):
            if place not in parts:
                raise self._error(
                    f"a matrix of expert {place[0]} of '{name}' is in none of its *.safetensors; "
                    "fetch the backbone again"
                )
            saved = parts[place]
            if saved.shape != example.shape or len(saved.shape) != 2:
                raise self._error(
                    f"'{saved.name}' in {saved.file.name} has shape {list(saved.shape)}, '{example.name}' in "
                    f"{example.file.name} {list(example.shape)}; fetch the backbone again"
                )
            pieces.append(_Piece(saved))
        rows, columns = example.shape
        return _Tensor((total, each * rows, columns), tuple(pieces), stacked=True)

    def _headers(self) -> Iterator[_Saved]:
        for file in self._files():
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    header = opened.get_slice(name)
                    yield _Saved(file, name, tuple(header.get_shape()), header.get_dtype())

    def _files(self) -> list[Path]:
        """The files that transformers would load: a single one, those of the index, or all there are."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            return sorted(self.folder.glob("*.safetensors"))
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise self._error(f"{index.name} cannot be read; fetch the backbone again") from error
        missing = sorted(name for name in names if not (self.folder / name).is_file())
        if missing:
            raise self._error(f"{index.name} names {missing[0]}, which is not there; fetch the backbone again")
        return sorted(self.folder / name for name in names)

    def _error(self, what: str) -> UserError:
        return UserError(f"backbone.path '{self.folder}': {what}")
