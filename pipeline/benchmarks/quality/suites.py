"""The suites: which tasks in which orders, and what a contract says about each."""

from dataclasses import dataclass
from typing import Any

LICENCE = "not ours: that of the benchmark the rows were taken from"  # the licence line of every contract
_TOPIC, _SENTIMENT = "{text}\nTopic:", "{text}\nSentiment:"
_RELATION = "{text}\nRelation of sentence 2 to sentence 1:"
_VERDICT, _VERDICTS = "评论：{text}\n判断：", {"violation": "违规", "compliant": "合规"}
_YES_NO = {"True": " yes", "False": " no"}


@dataclass(frozen=True)
class Task:
    """One task of a suite. Answers default to the label's name after a blank."""

    folder: str  # its folder below the data, unless `source` says another
    prompt: str  # of the contract
    answers: dict[str, str] | None = None  # answer text by label
    kind: str = "classification"
    metric: str = "accuracy"
    language: str = "en"
    form: str = "text"  # how a row is read: see `sampling.ROW_FORMS`
    max_answer_tokens: int = 24
    answer_match: str = "full"
    source: str | None = None  # folder below the data that several tasks are taken from
    part: tuple[int, int] | None = None  # (k, n): of its rows, in the order of their ids, every n-th from the k-th

    @property
    def data_folder(self) -> str:
        """The folder below the data that holds its rows."""
        return self.source or self.folder

    @property
    def name(self) -> str:
        """The contract's task name."""
        return self.folder.lower().replace("-", "_") if self.folder[0].isalpha() else f"t{self.folder.lower()}"


@dataclass(frozen=True)
class Suite:
    """Tasks, by folder, and the orders they are learned in. Rows longer than `max_tokens` are cut.

    `review` is the precision at which the model may decide rows by itself (METHODS section 5); None: not asked.
    """

    tasks: dict[str, Task]
    orders: dict[str, tuple[str, ...]]
    max_tokens: int
    review: float | None = None


def _suite(tasks: list[Task], orders: dict[str, str], max_tokens: int, review: float | None = None) -> Suite:
    named = {name: tuple(text.split()) for name, text in orders.items()}
    return Suite({task.folder: task for task in tasks}, named, max_tokens, review)


def _trace(folder: str, first: str, last: str, **settings: Any) -> Task:
    """A TRACE task: every prompt has the same first and last line, which the contract states."""
    return Task(folder, f"{first}\n{{text}}\n{last}", form="trace", **settings)


def _halves(sources: dict[str, str]) -> list[Task]:
    """Each source as two tasks of different rows; first the first halves."""
    return [
        Task(f"{source}_{half + 1}", prompt, source=source, part=(half, 2))
        for half in range(2)
        for source, prompt in sources.items()
    ]


_LETTERS = {letter: f" {letter}" for letter in "ABC"}
_MATH = "Solve the following math problem."

SUITES: dict[str, Suite] = {
    "mtl5": _suite(
        [
            Task("dbpedia", "{text}\nCategory:"),
            Task("amazon", _SENTIMENT),
            Task("yahoo", _TOPIC),
            Task("agnews", _TOPIC),
        ],
        {
            "O1": "dbpedia amazon yahoo agnews",  # METHODS section 1: the three orders of the paper
            "O2": "dbpedia amazon agnews yahoo",
            "O3": "yahoo amazon agnews dbpedia",
        },
        192,
    ),
    "long_sequence": _suite(
        [
            Task("mnli", _RELATION),
            Task("cb", _RELATION),
            Task("wic", "{text}\nSame meaning of the word in both sentences:", _YES_NO),
            Task("copa", "{text}\nAnswer:"),
            Task("qqp", "{text}\nThe two ask the same:", _YES_NO),
            Task("boolq", "{text}\nAnswer:", _YES_NO),
            Task("rte", _RELATION),
            Task("imdb", _SENTIMENT, {"Bad": " bad", "Good": " good"}),
            Task("sst2", _SENTIMENT, {"Bad": " bad", "Good": " good"}),
            Task("multirc", "{text}\n{question}\nThe answer is right:", _YES_NO, form="multirc"),
        ],
        # the order of the 15-task sequence of Progressive Prompts (arXiv 2301.12314, its order 8), without mtl5's five
        {"O1": "mnli cb wic copa qqp boolq rte imdb sst2 multirc"},
        320,
    ),
    "trace": _suite(
        [
            _trace(
                "C-STANCE",
                "判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。",
                "态度：",
                answers=_LETTERS,
                language="zh",
            ),
            _trace(
                "FOMC",
                "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. Choose "
                "one from A, B and C.",
                "Stance:",
                answers=_LETTERS,
            ),
            _trace(
                "MeetingBank",
                "Write a summary of the following meeting transcripts.",
                "Summary:",
                kind="generation",
                metric="rouge_l",
                max_answer_tokens=192,
            ),
            # TRACE scores the letter alone, so the reasons after it are neither learned nor generated
            Task(
                "ScienceQA",
                "Choose an answer for the following question and give your reasons.\n{text}\nAnswer:",
                form="trace_letter",
            ),
            _trace("NumGLUE-cm", _MATH, "Answer:", kind="generation", metric="exact_match", answer_match="first_line"),
            _trace("NumGLUE-ds", _MATH, "Answer:", kind="generation", metric="exact_match", answer_match="first_line"),
            _trace(
                "20Minuten",
                "Provide a simplified version of the following paragraph in German.",
                "Simplification:",
                kind="generation",
                metric="sari",
                language="de",
                max_answer_tokens=224,
            ),
        ],
        {"O1": "C-STANCE FOMC MeetingBank ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten"},  # TRACE's own
        512,
    ),
    # eight tasks akin to each other, of the data that jobs/demo.py makes: what a method keeps of a task it half knows
    "sentiment8": _suite(
        _halves(
            {
                "product_reviews": "Product review: {text}\nSentiment:",
                "tweets": "Tweet: {text}\nSentiment:",
                "movie_reviews": "Movie review: {text}\nSentiment:",
                "editorials": "Editorial: {text}\nSentiment:",
            }
        ),
        {
            "O1": "product_reviews_1 tweets_1 movie_reviews_1 editorials_1 "
            "product_reviews_2 tweets_2 movie_reviews_2 editorials_2"
        },
        128,
    ),
    "compliance3": _suite(
        [
            Task("social_bias", _VERDICT, _VERDICTS, language="zh"),
            Task("gender_weibo", _VERDICT, _VERDICTS, language="zh"),
            Task("entertainment_sport", _VERDICT, _VERDICTS, language="zh"),
        ],
        {
            "O1": "social_bias gender_weibo entertainment_sport",
            "O2": "gender_weibo entertainment_sport social_bias",
            "O3": "entertainment_sport social_bias gender_weibo",
        },
        256,
        review=0.95,
    ),
}


def contract_of(task: Task, labels: list[str], max_tokens: int) -> dict[str, Any]:
    """The contract of a task as its YAML says it; `labels` are the classes found in the data."""
    answers = task.answers or {name: f" {name}" for name in labels}
    return {
        "task": task.name,
        "version": "1.0.0",
        "owner": "benchmark",
        "description": f"{task.folder}, a sample",
        "kind": task.kind,
        "language": task.language,
        "source": {"format": "parquet", **{s: [f"{task.name}/{s}.parquet"] for s in ("train", "validation", "test")}},
        "columns": {"id": "id", "text": "text", "answer": "label"},
        "prompt": task.prompt,
        "labels": {name: answers[name] for name in labels} if task.kind == "classification" else None,
        "metric": task.metric,
        **({"answer_match": task.answer_match} if task.answer_match != "full" else {}),
        "limits": {
            "max_tokens": max_tokens,
            "max_answer_tokens": task.max_answer_tokens,
            "too_long": "truncate",
            "max_rejected_fraction": 1.0,  # counted in the cell
            "min_rows": {"train": 1, "validation": 1, "test": 1},
        },
        "licence": LICENCE,
        "sensitivity": "internal",
    }
