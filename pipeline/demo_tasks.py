"""The quickstart's four business tasks: sentences rated by people, as three balanced classes in splits without leaks.

The ratings are the ground-truth files of the source package `vaderSentiment` (Hutto & Gilbert, ICWSM 2014): product
reviews, tweets, film reviews and newspaper editorials, each sentence rated from -4 to 4 by at least 20 people.
"""

import html
import io
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import sha256_text

RATINGS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"  # an archive inside the archive

# Task -> its ground-truth file. A text found in two files stays with the earlier task.
TASK_FILES = {
    "product_reviews": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "movie_reviews": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
LABELS = ("negative", "neutral", "positive")
SIZES = {"test": 600, "validation": 240, "train": 900}  # rows a split at most, filled in this order
SEED = 20250


@dataclass(frozen=True)
class Sentence:
    """One rated sentence: its id in the source file, the text and its class."""

    id: str
    text: str
    label: str

    @property
    def document(self) -> str:
        """What the sentence was cut from: `12_3` is sentence 3 of review 12; `12` alone is a whole text."""
        return self.id.split("_")[0]


def label_of(rating: float) -> str | None:
    """The class of a mean rating in [-4, 4]; None between the classes."""
    if rating <= -1:
        return "negative"
    if -0.5 <= rating <= 0.5:
        return "neutral"
    return "positive" if rating >= 1 else None


def text_key(text: str) -> str:
    """What counts as the same text: case-folded, white space collapsed."""
    return " ".join(text.split()).casefold()


def read_ratings(package_file: Path) -> dict[str, list[Sentence]]:
    """Task -> its usable sentences, read out of the source package (which is never executed).

    Dropped: ratings between the classes, texts without a letter or under three characters, repeated texts (a text whose
    copies fall into different classes is dropped whole), texts that an earlier task already has.
    """
    tasks: dict[str, list[Sentence]] = {}
    seen: set[str] = set()
    with tarfile.open(package_file) as outer:
        inner_name = next(name for name in outer.getnames() if name.endswith(RATINGS_ARCHIVE))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner_name).read())) as inner:
            names = {Path(name).name: name for name in inner.getnames()}
            for task, file in TASK_FILES.items():
                content = inner.extractfile(names[file]).read().decode("utf-8")
                tasks[task] = _usable(content, seen)
    return tasks


def _usable(content: str, seen: set[str]) -> list[Sentence]:
    """The usable sentences of a ground-truth file (id, mean rating, text; tab-separated); its keys go into `seen`."""
    copies: dict[str, list[Sentence | None]] = defaultdict(list)
    for line in content.split("\n"):
        if not line.strip():
            continue
        row_id, rating, text = line.rstrip("\r").split("\t")
        text = html.unescape(text).strip()  # the source was scraped: &amp; stands for &
        if len(text) >= 3 and any(character.isalpha() for character in text):
            label = label_of(float(rating))
            copies[text_key(text)].append(Sentence(row_id, text, label) if label else None)
    usable = []
    for key, sentences in copies.items():
        first = sentences[0]
        if key not in seen and first and all(other and other.label == first.label for other in sentences):
            usable.append(first)
    seen.update(copies)
    return usable


def split_sentences(sentences: list[Sentence], task: str, sizes: dict[str, int]) -> dict[str, list[Sentence]]:
    """Cut one task's sentences into class-balanced splits; sentences of one document never stand in two splits.

    Documents are taken in an order fixed by the seed. Each split of `sizes` (name -> rows, filled in that order) but
    the last takes documents until every class has its third of the rows; the last takes the rest, as many as its
    scarcest class allows. Classes alternate within a split, so that every first 3n rows are balanced too. Raises
    ValueError when there are too few sentences for a split.
    """

    def order(text: str) -> str:
        return sha256_text(f"{SEED}/{task}/{text}")

    documents: dict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        documents[sentence.document].append(sentence)
    queue = sorted(documents, key=order, reverse=True)
    splits = {}
    *first_splits, last_split = sizes
    for split, rows in sizes.items():
        wanted = rows // len(LABELS)
        by_label: dict[str, list[Sentence]] = {label: [] for label in LABELS}
        while queue and (split == last_split or any(len(found) < wanted for found in by_label.values())):
            for sentence in documents[queue.pop()]:
                by_label[sentence.label].append(sentence)
        available = min(len(found) for found in by_label.values())
        if available == 0 or (split in first_splits and available < wanted):
            raise ValueError(
                f"task {task}: {available} rows of the scarcest class are left for {split}, {wanted} are needed"
            )
        ranked = [sorted(found, key=lambda sentence: order(sentence.id))[:wanted] for found in by_label.values()]
        splits[split] = [sentence for triple in zip(*ranked, strict=False) for sentence in triple]
    return splits


def write_tasks(tasks: dict[str, list[Sentence]], folder: Path, sizes: dict[str, int] = SIZES) -> None:
    """Write `folder`/<task>/<split>.parquet (columns id, text, label: strings) for every task and print the sizes."""
    for task, sentences in tasks.items():
        splits = split_sentences(sentences, task, sizes)
        (folder / task).mkdir()
        for split, rows in splits.items():
            table = pa.table(
                {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in ("id", "text", "label")}
            )
            pq.write_table(table, folder / task / f"{split}.parquet")
        counts = ", ".join(f"{split} {len(rows)}" for split, rows in reversed(splits.items()))
        print(f"  {task}: {counts} (a third in each class)", flush=True)
