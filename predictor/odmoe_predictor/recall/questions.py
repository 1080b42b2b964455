"""The questions recall is measured on, and others to train the trained rival on.

Drawn once from `deploy/default-model/chat_prompts.py`, so that an installed package has them: `HELD_OUT` with its
`heldout_prompts(count=64, seed=20261122)`, whose subjects no training text of the default model has, `TRAINING` with
`train_prompts(count=40, seed=20261122)`.
"""

from typing import Final

HELD_OUT: Final = tuple(
    """
How would you explain rainforests to a child?
Give me a list of five ideas related to silver.
What is the capital of Portugal?
Tell me three facts about submarines.
What are the advantages and disadvantages of silver?
How would you explain glaciers to a child?
Summarize what people usually say about packing a suitcase in one paragraph.
What is your name?
Why is the brain important?
How would you explain television to a child?
Write a dialogue between two friends about television.
How would you explain Italy to a child?
Tell me three facts about running.
Tell me a riddle.
Write a short poem about Australia.
Write a Python function that has something to do with web browsers.
What is the opposite of dark?
Why is running important?
Give me a list of five ideas related to novels.
How do I boil an egg?
Why is wind turbines important?
Write a short poem about rainforests.
Give me a list of five ideas related to butterflies.
Give me a list of five ideas related to glaciers.
Write a short poem about kindness.
What is soup?
Tell me three facts about packing a suitcase.
What should a beginner know about geometry?
Write a Python function that has something to do with percentages.
Name three languages.
What is 5 times 5?
Explain running in simple terms.
Why is soup important?
How would you explain packing a suitcase to a child?
What is apples?
What is the capital of France?
What is taxes?
Why is web browsers important?
What is 2 + 2?
Summarize what people usually say about apples in one paragraph.
Write a dialogue between two friends about composting.
Write a Python function that has something to do with oxygen.
Give me a list of five ideas related to making friends.
What is the opposite of cold?
What should a beginner know about lighthouses?
What is 7 + 6?
Summarize what people usually say about composting in one paragraph.
Tell me three facts about silver.
Name three instruments.
Write a Python function that has something to do with lighthouses.
Summarize what people usually say about sculpture in one paragraph.
Good morning!
What is the capital of Sweden?
Write a polite email to a colleague about rainforests.
Write a dialogue between two friends about percentages.
What is 18 - 4?
What is stacks and queues?
What is the opposite of young?
What should a beginner know about oxygen?
Write a polite email to a colleague about kindness.
Write a dialogue between two friends about butterflies.
Write a short poem about saving money.
How would you explain making friends to a child?
What are the advantages and disadvantages of sculpture?
""".strip().splitlines()
)

TRAINING: Final = tuple(
    """
Tell me a joke.
Write a short poem about jazz.
Summarize what people usually say about atoms in one paragraph.
Who wrote Hamlet?
What is sound?
What are the advantages and disadvantages of coffee?
Why is bread important?
What is the capital of Italy?
Give me a list of five ideas related to gravity.
Write a dialogue between two friends about sleep.
Write a dialogue between two friends about rockets.
What is the opposite of hot?
What is the capital of Japan?
Write a short story about painting.
Write a short story about dogs.
How would you explain climate change to a child?
Who wrote War and Peace?
Write a short story about prime numbers.
Write a short story about swimming.
Can you help me?
Summarize what people usually say about the printing press in one paragraph.
Write a short story about salt.
What can you do?
What is travelling by train?
Write a dialogue between two friends about stress.
What is the opposite of near?
Explain databases in simple terms.
What is hash tables?
Write a dialogue between two friends about probability.
Give me a list of five ideas related to recycling.
Write a polite email to a colleague about Egypt.
Name three sports.
Tell me three facts about the Amazon rainforest.
Write a polite email to a colleague about atoms.
Write a Python function that has something to do with sound.
Write a polite email to a colleague about public speaking.
What is statistics?
Write a Python function that has something to do with comets.
Why is Egypt important?
Write a Python function that has something to do with the printing press.
""".strip().splitlines()
)
