"""Questions for which the dense parent writes the chat text that training and evaluation use.

Knows subjects and ways to ask; training and held-out prompts share the ways and nothing
else. Does not know the model.
"""

from __future__ import annotations

import random

_TRAIN_SUBJECTS = """
photosynthesis; the water cycle; gravity; black holes; the French Revolution; the Roman Empire;
vaccines; the human heart; volcanoes; earthquakes; democracy; inflation; supply and demand; electric
motors; batteries; solar panels; the internet; search engines; machine learning; neural networks;
databases; operating systems; recursion; sorting algorithms; binary search; hash tables; linked
lists; unit tests; version control; compilers; the Moon; Mars; comets; the Amazon rainforest; coral
reefs; whales; bees; penguins; dogs; cats; horses; bread; cheese; coffee; tea; chocolate; pasta;
chess; football; swimming; yoga; meditation; sleep; stress; friendship; honesty; courage; painting;
jazz; the piano; poetry; Shakespeare; the Renaissance; the printing press; steam engines; railways;
bicycles; aeroplanes; rockets; the telephone; radio waves; light; sound; heat; magnets; atoms;
acids; salt; gold; iron; glass; paper; cotton; rice; potatoes; tomatoes; gardening; recycling;
climate change; deserts; rivers; islands; Egypt; Japan; Brazil; India; Kenya; Canada; Spain; Norway;
fractions; prime numbers; probability; the Pythagorean theorem; algebra; statistics; budgets; job
interviews; teamwork; time management; public speaking; writing a letter; learning a language;
travelling by train; a birthday party
"""

_HELDOUT_SUBJECTS = """
evolution; dinosaurs; the Cold War; antibiotics; the brain; hurricanes; taxes; wind turbines;
encryption; web browsers; stacks and queues; debugging; the Sun; rainforests; elephants;
butterflies; soup; ice cream; tennis; running; kindness; sculpture; the violin; novels; lighthouses;
submarines; television; rainbows; oxygen; silver; wool; apples; composting; glaciers; Italy; Mexico;
Australia; percentages; geometry; saving money; making friends; packing a suitcase
"""

_WAYS = (
    "What is {s}?",
    "Explain {s} in simple terms.",
    "Tell me three facts about {s}.",
    "Write a short story about {s}.",
    "Write a short poem about {s}.",
    "Why is {s} important?",
    "How would you explain {s} to a child?",
    "Give me a list of five ideas related to {s}.",
    "What should a beginner know about {s}?",
    "Write a polite email to a colleague about {s}.",
    "What are the advantages and disadvantages of {s}?",
    "Write a Python function that has something to do with {s}.",
    "Summarize what people usually say about {s} in one paragraph.",
    "Write a dialogue between two friends about {s}.",
)

_TRAIN_SHORT = """What is the capital of {Germany|Spain|Italy|Japan|Egypt|Canada|Brazil|India}?
What is the capital of {Kenya|Norway|Poland|Greece}?
What is {3 + 4|12 - 5|6 times 7|20 divided by 4|9 + 8|15 - 9|8 times 3|100 divided by 10}?
Name three {fruits|animals|colours|planets|sports|cities|tools|vegetables|birds|inventions}.
What is the opposite of {hot|big|fast|happy|early|light|strong|old|full|near}?
Who wrote {Hamlet|Don Quixote|War and Peace|Pride and Prejudice|The Odyssey}?
Translate "{good morning|thank you|see you soon|my name is Anna}" into {French|Spanish|German}.
{Hello!|Hi, how are you?|Good evening.|Who are you?|What can you do?}
{Can you help me?|Thank you very much.|Tell me a joke.}"""

_HELDOUT_SHORT = """What is the capital of {France|Portugal|Sweden|Peru|Austria}?
What is {2 + 2|7 + 6|5 times 5|18 - 4}?
Name three {flowers|instruments|countries|languages}.
What is the opposite of {cold|slow|dark|young}?
{Good morning!|What is your name?|Tell me a riddle.|How do I boil an egg?}"""


def train_prompts(*, count: int, seed: int) -> list[str]:
    """A seeded draw of training prompts, about a quarter of them short questions."""
    return _draw(_TRAIN_SUBJECTS, _TRAIN_SHORT, count=count, seed=seed)


def heldout_prompts(*, count: int, seed: int) -> list[str]:
    """A seeded draw of prompts about subjects that no training prompt names."""
    return _draw(_HELDOUT_SUBJECTS, _HELDOUT_SHORT, count=count, seed=seed)


def _draw(subjects: str, short: str, *, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    names = [" ".join(subject.split()) for subject in subjects.split(";")]
    long_questions = [way.format(s=name) for name in names for way in _WAYS]
    short_questions = [question for line in short.splitlines() for question in _alternatives(line)]
    num_short = min(len(short_questions), count // 4)
    chosen = rng.sample(short_questions, num_short) + rng.sample(long_questions, count - num_short)
    rng.shuffle(chosen)
    return chosen


def _alternatives(line: str) -> list[str]:
    """Expand the `{a|b}` groups of a line."""
    head, brace, rest = line.partition("{")
    if not brace:
        return [line]
    group, _, tail = rest.partition("}")
    return [head + choice + end for choice in group.split("|") for end in _alternatives(tail)]
