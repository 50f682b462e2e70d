"""What the three demo adapters learn: generated examples, held-out prompts, and a cheap checker for each.

- support: a warm, short reply of customer support whose last line is `Category: <ONE OF FIVE>`;
- sql: one SQL statement over `SCHEMA`, and nothing else;
- legal: a clause explained in one plain sentence that starts with `In plain words:`.

Everything is drawn from templates with a fixed seed. Each subject (an issue, a kind of query, a kind of clause)
keeps its last wording for the held-out prompts, so none of those is a training prompt with other numbers.
There is no system prompt: the adapter alone changes how the model answers.
"""

from __future__ import annotations

import random
import re
import sqlite3
from dataclasses import dataclass

from demo_templates import CITIES, KINDS, LEGAL, LEGAL_ASK, PEOPLE, PRODUCTS, SQL, STATES, STATUSES, SUPPORT
from demo_templates import Subject as Subject

SYSTEM_PROMPTS: dict[str, str] | None = None

NAMES = ("support", "sql", "legal")

CATEGORIES = ("BILLING", "SHIPPING", "ACCOUNT", "TECHNICAL", "RETURNS")

SCHEMA = """\
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, signup_date TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, product_id INTEGER, quantity INTEGER,
                     order_date TEXT, status TEXT);
"""

DEMO_PROMPTS = {
    "support": "My coffee grinder stopped working after two days. Can you help?",
    "sql": "Which five customers have placed the most orders?",
    "legal": (
        "What am I agreeing to here? \"Neither party shall be liable for any delay or failure to perform caused by "
        'events beyond its reasonable control, including fire, flood, war or strike."'
    ),
}
"""One prompt per adapter for a live demonstration; none of them is among the training prompts."""


@dataclass(frozen=True)
class Example:
    """A user's message, the answer to learn, and the words that an answer must contain to be right."""

    prompt: str
    answer: str
    facts: tuple[str, ...] = ()


def training(name: str, count: int) -> list[Example]:
    """`count` different examples in a fixed order."""
    rng = random.Random(f"{name} training")
    seen: dict[str, Example] = {}
    while len(seen) < count:
        subject = rng.choice(_SUBJECTS[name])
        example = _draw(name, subject, rng.choice(subject.wordings[:-1]), rng, held_out=False)
        seen.setdefault(example.prompt, example)
    return list(seen.values())


def held_out(name: str, per_subject: int = 3) -> list[Example]:
    """Examples in wordings that `training` never uses, `per_subject` of each subject, in a fixed order."""
    rng = random.Random(f"{name} held out")
    seen: dict[str, Example] = {}
    for subject in _SUBJECTS[name]:
        for _ in range(per_subject):
            example = _draw(name, subject, subject.wordings[-1], rng, held_out=True)
            seen.setdefault(example.prompt, example)
    return list(seen.values())


def check(name: str, example: Example, answer: str) -> bool:
    """Whether `answer` does what adapter `name` is for, judged against the reference in `example`."""
    return _CHECKS[name](example, answer.strip())


def _draw(name: str, subject: Subject, wording: str, rng: random.Random, *, held_out: bool) -> Example:
    slots = _slots(rng)
    prompt = wording.format(**slots)
    if name == "legal":
        asks = LEGAL_ASK[-1:] if held_out else LEGAL_ASK[:-1]
        prompt = rng.choice(asks).format(clause=prompt)
    answer = rng.choice(subject.answers).format(**slots)
    return Example(prompt, answer, tuple(fact.format(**slots) for fact in subject.facts))


def _slots(rng: random.Random) -> dict[str, str]:
    """A value for every placeholder that a template may use."""
    year = rng.choice(["2022", "2023", "2024"])
    return {
        "order": f"#{rng.randrange(10000, 99999)}",
        "product": rng.choice(PRODUCTS),
        "city": rng.choice(CITIES),
        "kind": rng.choice(KINDS),
        "person": rng.choice(PEOPLE),
        "state": rng.choice(STATES),
        "status": rng.choice(STATUSES),
        "date": f"{year}-{rng.randrange(1, 13):02d}-01",
        "price": str(rng.choice([10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 100, 120, 150, 200])),
        "few": str(rng.choice([3, 5, 7, 10])),
        "units": str(rng.choice([5, 10, 15, 20, 25, 30, 40, 50])),
        "days": str(rng.choice([7, 10, 14, 15, 21, 30, 45, 60, 90])),
        "hours": str(rng.choice([12, 24, 36, 48, 72])),
        "years": str(rng.choice([2, 3, 4, 5, 7, 10])),
        "months": str(rng.choice([3, 6, 9, 12, 18, 24])),
        "day": str(rng.randrange(2, 29)),
        "fee": str(rng.choice([25, 35, 40, 50, 75, 100, 150])),
        "sum": str(rng.choice([500, 800, 1000, 1200, 1500, 2000, 2500])),
        "percent": str(rng.choice([2, 3, 4, 5, 6, 8, 10])),
    }


def _check_support(example: Example, answer: str) -> bool:
    body, _, last = answer.rpartition("\n")
    labels = re.findall(r"Category: (\w+)", answer)
    return bool(body.strip()) and last == f"Category: {example.facts[0]}" and len(labels) == 1


def _check_legal(example: Example, answer: str) -> bool:
    return answer.startswith("In plain words:") and all(fact in answer for fact in example.facts)


def _check_sql(example: Example, answer: str) -> bool:
    """One SELECT that returns what the reference returns on a small shop (in order where the reference orders)."""
    if not re.match(r"SELECT\b", answer):
        return False
    with sqlite3.connect(":memory:") as shop:
        _fill(shop)
        try:
            got = shop.execute(answer).fetchall()  # execute refuses a second statement
        except sqlite3.Error:
            return False
        expected = shop.execute(example.answer).fetchall()
    return got == expected if "ORDER BY" in example.answer else sorted(got) == sorted(expected)


def _fill(shop: sqlite3.Connection) -> None:
    """Enough rows for every query of the templates to return some, and for wrong ones to return others."""
    rng = random.Random("shop")
    shop.executescript(SCHEMA)

    def day() -> str:
        return f"{rng.choice([2021, 2022, 2023, 2024])}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"

    for key, person in enumerate(PEOPLE * 5, start=1):
        surname = f" {chr(65 + key % 26)}." if key > len(PEOPLE) else ""
        shop.execute("INSERT INTO customers VALUES (?, ?, ?, ?)", (key, person + surname, rng.choice(CITIES), day()))
    for key, product in enumerate(PRODUCTS, start=1):
        price, stock = rng.randrange(500, 25000) / 100, rng.choice([0, 0, rng.randrange(1, 60)])
        shop.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?)", (key, product, KINDS[key % len(KINDS)], price, stock))
    for key in range(1, 301):
        # Few customers buy much and some never buy, so that "most" and "never" have an answer.
        buyer = int(rng.triangular(1, len(PEOPLE) * 4, 1))
        row = (key, buyer, rng.randrange(1, len(PRODUCTS) + 1), rng.randrange(1, 6), day(), rng.choice(STATUSES))
        shop.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", row)


_SUBJECTS = {"support": SUPPORT, "sql": SQL, "legal": LEGAL}
_CHECKS = {"support": _check_support, "sql": _check_sql, "legal": _check_legal}
