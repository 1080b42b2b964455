"""Factual and arithmetic questions, made for this benchmark, that a small model answers in part.

Each has the words one of which a right answer must hold, as a word of its own, whatever its case.
"""

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Question:
    """A question and the answers that count as right."""

    text: str
    answers: tuple[str, ...]


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer holds one of the right words."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in question.answers)


_CAPITALS: Final = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "England": "London",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Cuba": "Havana",
    "Peru": "Lima",
    "China": "Beijing",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
}
_SUMS: Final = ((2, 2), (3, 4), (5, 5), (7, 6), (8, 9), (10, 5), (12, 3), (6, 6), (20, 10), (15, 7), (9, 4), (11, 8))
_PRODUCTS: Final = ((2, 3), (5, 5), (3, 4), (6, 7), (10, 10), (8, 2), (9, 3), (4, 4))
_FACTS: Final = (
    ("How many days are there in a week?", "7", "seven"),
    ("How many legs does a spider have?", "8", "eight"),
    ("How many months are there in a year?", "12", "twelve"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"),
    ("Which planet is the largest in the solar system?", "Jupiter"),
    ("What gas do plants take from the air?", "carbon dioxide", "CO2"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What do bees make?", "honey"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("Which ocean lies between Europe and America?", "Atlantic"),
    ("What is frozen water called?", "ice"),
    ("How many sides does a triangle have?", "3", "three"),
    ("Which animal is known as man's best friend?", "dog", "dogs"),
    ("On which continent is Kenya?", "Africa"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("Which star is closest to the Earth?", "Sun"),
    ("How many minutes are there in an hour?", "60", "sixty"),
)

QUESTIONS: Final = (
    *(Question(f"What is the capital of {country}?", (city,)) for country, city in _CAPITALS.items()),
    *(Question(f"What is {a} + {b}?", (str(a + b),)) for a, b in _SUMS),
    *(Question(f"What is {a} times {b}?", (str(a * b),)) for a, b in _PRODUCTS),
    *(Question(text, tuple(answers)) for text, *answers in _FACTS),
)
