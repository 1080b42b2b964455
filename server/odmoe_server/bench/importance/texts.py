"""Held-out text to measure quality on: written for this benchmark, so that no model here was trained on it.

Twelve passages of at least 144 tokens, in groups of three that are decoded side by side.
"""

from typing import Final

TEXTS: Final = (
    """\
The valley lies between two long ridges, and for most of the year a river runs through the middle of it. In spring
the snow on the northern slopes melts, the water rises by more than a metre, and the lower fields are flooded for
several weeks. Farmers have learned to plant late. They grow barley, beans and potatoes on the higher ground, and keep
the meadows near the river for cattle. A small road follows the eastern bank as far as the old bridge, where it divides.
One branch climbs to the pass and the villages beyond it; the other ends at a mill that has not worked for fifty years.
Visitors who come in summer rarely believe how much water passes under that bridge in April, or how quickly the ground
dries once the floods are over and the wind turns to the south.""",
    """\
A battery stores energy in chemical form and releases it as an electric current. It has two electrodes, one positive
and one negative, with a liquid or a paste between them that lets ions pass but not electrons. When the two ends are
connected by a wire, electrons flow through the wire from the negative electrode to the positive one, while ions move
inside the cell to keep the charge in balance. In a battery that can be recharged, the reaction is reversed by pushing a
current through the cell in the other direction. Each cycle changes the electrodes a little. After several hundred
cycles, part of the material no longer takes part in the reaction, and the battery holds less energy than it did when it
was new. Heat makes this process faster, which is why batteries should be kept cool.""",
    """\
"Did you lock the back door?" asked Martha, putting the bags down on the kitchen table. "I thought you did," said her
brother. He looked at the clock above the stove. It was already half past ten, and the last train left at eleven. "One
of us has to go back and check, then," she said. "It should be you, because you have the key." He laughed and shook his
head. "I gave you the key this morning, don't you remember? You said that I lose everything." Martha opened her purse
and began to search. She found two tickets, a pencil, an old letter, and a handful of coins, but no key. "I was sure
that I had it," she said quietly. Then they both heard a sound from the hall, and somebody turned the handle of the
front door.""",
    """\
def moving_average(values, width):
    \"\"\"Return the average of each run of `width` neighbouring values.\"\"\"
    if width < 1:
        raise ValueError("width must be at least 1")
    averages = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        if index >= width - 1:
            averages.append(total / width)
    return averages


def main():
    values = [3, 5, 8, 13, 21, 34, 55]
    for width in range(1, len(values) + 1):
        print(width, moving_average(values, width))


if __name__ == "__main__":
    main()
""",
    """\
To make a simple vegetable soup, begin with an onion, two carrots and a stick of celery. Cut them into small pieces
and cook them slowly in a spoonful of oil until they are soft, which takes about ten minutes. Do not let them turn
brown. Add two potatoes, cut into cubes, and a litre of water or stock. Bring the soup to the boil, then lower the heat
and let it cook gently for twenty minutes. When the potatoes are done, add a handful of peas and some salt and pepper,
and cook for five more minutes. If you like a smooth soup, use a blender; if you prefer to see the vegetables, leave it
as it is. Serve it hot with fresh bread and butter. What is left over can be kept in the fridge for three days, and many
people say that it tastes better on the second day than on the first.""",
    """\
The history of the lighthouse begins with a shipwreck. In the winter of 1821 a merchant ship called the Good Intent
struck the rocks below the cliff and sank within an hour, and only four of her crew of nineteen reached the shore. The
merchants of the town demanded a light, and after three years of argument the government agreed to pay for one half of
it. The tower was built of grey stone, carried by boat from a quarry twelve miles away. It was twenty-six metres high,
with walls two metres thick at the base. The first lamp burned whale oil and could be seen from a distance of fourteen
miles. It was replaced by a paraffin lamp in 1872, and by an electric one in 1931. Since 1988 the light has worked by
itself, and the house of the keeper has become a small museum.""",
    """\
Dear Ms. Alvarez, thank you for your letter of the fourth of March, in which you asked about the delay of your order.
I am sorry that you have not heard from us before. The two chairs were sent from our warehouse on the twentieth of
February, but the truck that carried them was damaged on the road, and the goods had to be returned. We have inspected
them and found that one of the chairs has a scratch on the left arm. We will therefore send you a new one, and you
should receive both chairs before the end of next week. You do not have to pay for the delivery. If you would rather
cancel the order, please let us know by telephone or by e-mail, and we will return your money within five working days.
I hope that you will accept our apologies for the trouble. Yours sincerely, Thomas Reed.""",
    """\
Cells are the smallest units of living things. A bacterium consists of a single cell, while the body of a human being
contains many millions of millions of them. Every cell is surrounded by a thin membrane, which decides what may enter
and what may leave. Plants and animals keep their genetic material in a nucleus; bacteria do not. The instructions in
the genes are copied into molecules of RNA, and these are read by small machines called ribosomes, which build proteins
out of amino acids. Proteins do most of the work in a cell. Some of them speed up chemical reactions, others carry
signals or give the cell its shape. The energy for all this comes from sugar and other food, which is broken down step
by step in structures called mitochondria. Plant cells can also use the light of the sun to make sugar from water and
carbon dioxide.""",
    """\
User: My computer has become very slow since last week. What can I do about it? Assistant: There are several possible
reasons for that. First, check how much free space there is on the disk, because a computer with a full disk works
slowly. Second, look at the list of programs that start when you turn the computer on, and remove the ones that you do
not need. Third, find out whether a program uses a lot of memory or processor time in the background. User: The disk is
almost full. I have only two gigabytes left. Assistant: That is probably the cause. You can delete old downloads, empty
the trash, and move photos and videos to an external disk. After that, restart the computer and see whether it has
become faster. User: Thank you, I will try it this evening. Assistant: You are welcome. If it does not help, come back
and tell me what you have seen.""",
    """\
A queue is a list in which the element that was added first is removed first. People who wait in front of a counter
form a queue, and so do the documents that are sent to a printer. A stack works the other way round: the element that
was added last is the first to be removed, like the top plate of a pile. Both can be built on an array. For a stack it
is enough to remember how many elements there are. For a queue one needs two numbers, the place of the first element
and the place behind the last one, and both begin again at zero when they reach the end of the array. Adding and
removing take the same short time, however many elements there are. When the array is full, a larger one has to be made
and all elements have to be copied, which happens so seldom that on average it does not matter.""",
    """\
The old man sat on the bench in front of the station and watched the pigeons. He came here every morning at nine, with
a paper bag of crumbs in the left pocket of his coat, and stayed until the bells of the church rang twelve. Nobody knew
his name. The boy who sold newspapers called him Captain, because of his white beard and his blue cap, and the old man
had never objected. One day in November the bench was empty. The boy thought that the rain had kept the Captain at home,
but the next day was dry and bright, and still he did not come. On the third day the boy took the crumbs of his own
breakfast, put them into a paper bag, and sat down on the bench at nine o'clock. The pigeons came at once, as if nothing
had happened, and the boy wondered what he would say if someone asked him about it.""",
    """\
# Installing the program

Download the archive for your system and unpack it in a directory of your choice. On Linux and macOS, open a terminal,
change to the directory and run `./install.sh`; on Windows, run `install.bat`. The script asks where the data should be
kept. If you press Enter, it uses the folder `data` beside the program. You need about 500 megabytes of free space.

## Configuration

All settings are in the file `settings.toml`. Each line has the form `name = value`, and lines that begin with `#` are
comments. The most important settings are `port`, the number of the port on which the server listens, and `log_level`,
which may be `debug`, `info`, `warning` or `error`. Changes take effect when the server is restarted. To see whether the
settings are valid, run the program with the option `--check`.""",
)
