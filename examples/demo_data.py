"""What the three demo adapters learn: generated examples, held-out prompts, and a cheap checker for each.

- support: a warm, short reply of customer support whose last line is `Category: <ONE OF FIVE>`;
- sql: one SQL statement over `SCHEMA`, and nothing else;
- legal: a clause explained in one plain sentence that starts with `In plain words:`.

Everything is drawn with a fixed seed from `demo_templates.toml`. Each subject there (an issue, a kind of
query or clause) keeps its last wording for the held-out prompts, so none of those is a training prompt with
other numbers.
There is no system prompt: the adapter alone changes how the model answers.
"""

from __future__ import annotations

import random
import re
import sqlite3
import tomllib
from dataclasses import dataclass
from pathlib import Path

NAMES = ("support", "sql", "legal")

CATEGORIES = ("BILLING", "SHIPPING", "ACCOUNT", "TECHNICAL", "RETURNS")

SCHEMA = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, signup_date TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, product_id INTEGER, quantity INTEGER,
                     order_date TEXT, status TEXT);
"""

_OPENERS = ("Thank you for reaching out, and I'm so sorry about this!", "Oh no, I'm so sorry about that!")


@dataclass(frozen=True)
class Example:
    """A user's message, the answer to learn, and the words that an answer must contain to be right."""

    prompt: str
    answer: str
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Subject:
    """One table of the template file: `answers` to draw one from, and the wordings of the user's message."""

    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    facts: tuple[str, ...]


def training(name: str, count: int) -> list[Example]:
    """`count` different examples in a fixed order."""
    rng = random.Random(f"{name} training")
    seen: dict[str, Example] = {}
    while len(seen) < count:
        example = _draw(name, rng.choice(_SUBJECTS[name]), rng, held_out=False)
        seen.setdefault(example.prompt, example)
    return list(seen.values())


def held_out(name: str, per_subject: int = 3) -> list[Example]:
    """Up to `per_subject` different examples of each subject, in wordings that `training` never uses."""
    rng = random.Random(f"{name} held out")
    drawn = [
        _draw(name, subject, rng, held_out=True) for subject in _SUBJECTS[name] for _ in range(per_subject)
    ]
    return list({example.prompt: example for example in drawn}.values())


def check(name: str, example: Example, answer: str) -> bool:
    """Whether `answer` does what adapter `name` is for, judged against the reference in `example`."""
    return _CHECKS[name](example, answer.strip())


def _draw(name: str, subject: _Subject, rng: random.Random, *, held_out: bool) -> Example:
    slots = _slots(rng)
    wording = subject.wordings[-1] if held_out else rng.choice(subject.wordings[:-1])
    prompt = wording.format(**slots)
    if name == "legal":
        questions: list[str] = _TEMPLATES["legal_questions"]["wordings"]
        question = questions[-1] if held_out else rng.choice(questions[:-1])
        prompt = question.format(clause=prompt)
    answer = rng.choice(subject.answers).format(**slots)
    return Example(prompt, answer, tuple(fact.format(**slots) for fact in subject.facts))


def _slots(rng: random.Random) -> dict[str, str]:
    """A value for every placeholder that a template may use."""
    year, month = rng.choice([2022, 2023, 2024]), rng.randrange(1, 13)
    words = {slot: rng.choice(values) for slot, values in _TEMPLATES["slots"].items()}
    numbers = {slot: str(rng.choice(values)) for slot, values in _NUMBERS.items()}
    return words | numbers | {"order": f"#{rng.randrange(10000, 99999)}", "date": f"{year}-{month:02d}-01"}


def _check_support(example: Example, answer: str) -> bool:
    body, _, last = answer.rpartition("\n")
    return bool(body.strip()) and "Category:" not in body and last == f"Category: {example.facts[0]}"


def _check_legal(example: Example, answer: str) -> bool:
    return answer.startswith("In plain words:") and all(fact in answer for fact in example.facts)


def _check_sql(example: Example, answer: str) -> bool:
    """One SELECT that returns what the reference returns from a small shop, in order where that orders."""
    if not re.match(r"SELECT\b", answer):
        return False
    shop = sqlite3.connect(":memory:")
    try:
        _fill(shop)
        expected = shop.execute(example.answer).fetchall()
        got = shop.execute(answer).fetchall()  # refuses a second statement
    except sqlite3.Error:
        return False
    finally:
        shop.close()
    return got == expected if "ORDER BY" in example.answer else sorted(got) == sorted(expected)


def _fill(shop: sqlite3.Connection) -> None:
    """Enough rows for every query of the templates to return some, and for a wrong query to return others."""
    rng = random.Random("shop")
    slots = _TEMPLATES["slots"]
    people, products, kinds = slots["person"], slots["product"], slots["kind"]
    shop.executescript(SCHEMA)

    def day() -> str:
        return f"{rng.choice([2021, 2022, 2023, 2024])}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"

    for key, person in enumerate(people * 5, start=1):
        surname = f" {chr(65 + key % 26)}." if key > len(people) else ""
        customer = (key, person + surname, rng.choice(slots["city"]), day())
        shop.execute("INSERT INTO customers VALUES (?, ?, ?, ?)", customer)
    for key, name in enumerate(products, start=1):
        price, stock = rng.randrange(500, 25000) / 100, rng.choice([0, 0, rng.randrange(1, 60)])
        product = (key, name, kinds[key % len(kinds)], price, stock)
        shop.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?)", product)
    for key in range(1, 301):
        # Few customers buy much and some never buy, so that "most" and "never" have an answer.
        buyer, bought = int(rng.triangular(1, len(people) * 4, 1)), rng.randrange(1, len(products) + 1)
        order = (key, buyer, bought, rng.randrange(1, 6), day(), rng.choice(slots["status"]))
        shop.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", order)


def _subject(name: str, table: dict[str, str | list[str]]) -> _Subject:
    answer, wordings, facts = str(table["answer"]), tuple(table["wordings"]), tuple(table.get("facts", ()))
    if name != "support":
        return _Subject(wordings, (answer,), facts)
    category = str(table["category"])
    replies = tuple(f"{opener} {answer}\nCategory: {category}" for opener in _OPENERS)
    return _Subject(wordings, replies, (category,))


_NUMBERS = {
    "price": (10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 100, 120, 150, 200),
    "few": (3, 5, 7, 10),
    "units": (5, 10, 15, 20, 25, 30, 40, 50),
    "days": (7, 10, 14, 15, 21, 30, 45, 60, 90),
    "hours": (12, 24, 36, 48, 72),
    "years": (2, 3, 4, 5, 7, 10),
    "months": (3, 6, 9, 12, 18, 24),
    "day": tuple(range(2, 29)),
    "fee": (25, 35, 40, 50, 75, 100, 150),
    "sum": (500, 800, 1000, 1200, 1500, 2000, 2500),
    "percent": (2, 3, 4, 5, 6, 8, 10),
}
_TEMPLATES = tomllib.loads(Path(__file__).with_name("demo_templates.toml").read_text(encoding="utf-8"))
_SUBJECTS = {name: [_subject(name, table) for table in _TEMPLATES[name]] for name in NAMES}
_CHECKS = {"support": _check_support, "sql": _check_sql, "legal": _check_legal}
