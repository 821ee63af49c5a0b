"""The grammar behind the story model: small tales with facts worth remembering.

Every story is drawn from a seeded `random.Random`, so a seed *is* a data set.
A story has named characters with trades, homes and favourite dishes, objects
that are hidden in places, found, moved and passed on, and a triple of magic
words.  Facts are told in the first part of the tale; then the weather, the
road and the talk of the characters fill a few hundred tokens, and only after
"The end." come the questions.  Answering them needs exact recall from far
back, which is what makes the model a probe for key/value caches.

Why the phrasing of facts is so regular: the state of an object always follows
its name directly ("... the silver key under the old bridge", "... the silver
key to Tom").  A transformer of a few layers can learn to look that up; the
tale's *content* (names x objects x places) is far too varied to memorise.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

NAMES = ("Mia Tom Ada Ben Cora Dan Elsa Finn Greta Hugo Ida Jack Kira Leo Nora "
         "Otto Pia Rosa Sam Tilda Uma Vera Will Zoe").split()
JOBS = ("baker sailor miller weaver painter gardener fisher tailor singer "
        "hunter teacher carpenter doctor shepherd smith potter").split()
TOWNS = ["Willow Hill", "Stone Bay", "Green Hollow", "North Harbor", "Apple Green",
         "Silver Lake", "Fox Bridge", "Raven Hill", "Stone Hollow", "Willow Bay",
         "North Lake", "Fox Harbor", "Apple Hill", "Raven Bay", "Green Bridge",
         "Silver Hollow"]
DISHES = [f"{a} {b}" for a in "plum onion honey pear mushroom cherry lemon pumpkin".split()
          for b in "cake soup bread pie".split()]
OBJECT_ADJ = "silver red golden blue tiny wooden glass copper green black white broken".split()
OBJECT_NOUN = ("key lantern ring map book bell cup coin drum flute mirror knife "
               "rope box crown shell whistle compass feather button").split()
PLACE_ADJ = "old mossy quiet dark crooked tall round narrow stony sunny dusty hollow".split()
PLACES = [("under", "bridge"), ("behind", "mill"), ("inside", "barn"), ("near", "well"),
          ("beside", "gate"), ("under", "oak"), ("inside", "tower"), ("behind", "wall"),
          ("inside", "cave"), ("near", "pond"), ("beside", "fence"), ("under", "stairs"),
          ("inside", "chapel"), ("behind", "stable"), ("near", "statue"), ("beside", "boat"),
          ("under", "bench"), ("inside", "cellar"), ("behind", "waterfall"), ("near", "mill"),
          ("beside", "well"), ("under", "tower"), ("inside", "boat"), ("behind", "oak"),
          ("near", "bridge"), ("beside", "pond"), ("near", "chapel"), ("behind", "barn")]
MAGIC = ("amber fern moss thistle thunder bramble ivory velvet ember frost maple "
         "clover marble raven cinder willow").split()
ANIMALS = "fox owl cat dog goat crow hare duck horse mouse".split()
WEATHER = ["rain", "snow", "wind", "fog", "thunder", "sunshine"]
SEASONS = "spring summer autumn winter".split()
FEELINGS = "happy tired brave afraid proud hungry curious calm".split()
THINGS = "apples letters stones songs candles flowers leaves nuts".split()

OPENINGS = [
    "Once upon a time, in {season}, there was a little town where everybody knew everybody.",
    "Once there was a valley where the {weather} came every {season} and stayed too long.",
    "Long ago, when the roads were still made of sand, this is what happened.",
    "It was the first day of {season}, and the air smelled of {weather}.",
    "Once upon a time there were {n} friends who could never sit still.",
    "Once there was a {season} that nobody would ever forget.",
    "In the far north, where the {animal} sleeps all day, people still tell this story.",
    "One morning in {season} the whole town woke up early.",
    "Far away, between two rivers, there was a town with a single street.",
    "Many years ago, before the great {weather}, life was slow and good.",
]
BRIDGES = [
    "The next morning everything was quiet.", "Then the {weather} came.",
    "After supper the moon came up.", "The day was still young.",
    "A {animal} watched from the roof and said nothing.", "Nobody saw what happened next.",
    "Soon it was evening.", "That was not all.", "Later the clouds went away.",
    "The bells rang twelve times.", "On the second day the road was dry again.",
    "There was a lot to do.", "It was almost dark.", "The wind turned.",
    "In the afternoon the {animal} came back.", "Three days went by.",
]
# Small events and talk.  None of them says where anything is or who has it.
FILLERS = [
    "{A} and {B} walked along the river and counted the {things}.",
    "\"The {weather} will not last,\" said {A}.",
    "\"Are you {feeling}?\" asked {A}. \"A little,\" said {B}.",
    "The {weather} grew stronger, and they had to wait under a roof.",
    "{A} sang a song about a {animal} that could not swim.",
    "A {animal} crossed the road and looked at them for a long time.",
    "{A} told a long story about a {animal} and a {animal2}.",
    "They laughed until the stars came out.",
    "At noon they sat down in the grass and ate {things0}.",
    "\"I have never been so {feeling},\" said {A}.",
    "{B} did not answer, but smiled.",
    "In the distance somebody was playing a slow tune.",
    "The road went up and down, and the hills were full of {things}.",
    "{A} felt {feeling}, but nobody could see it.",
    "\"Look, a {animal}!\" said {A}. It was gone before {B} could turn around.",
    "They made a small fire and talked about the {season}.",
    "The {animal} ran in front of them as if it knew the way.",
    "{A} fell into the mud, and {B} laughed so hard that the {animal} ran away.",
    "\"Tell me the truth,\" said {A}. \"I always do,\" said {B}.",
    "When the {weather} stopped, the whole world seemed new.",
    "All night long the {weather} beat against the windows.",
    "{A} dreamed of a ship made of {things}.",
    "\"We should go home before dark,\" said {B}.",
    "An old woman on the road sold them {things0} and wished them luck.",
    "The {season} light was soft, and the birds were loud.",
    "{A} wrote a letter and threw it into the fire.",
    "Nobody spoke for a while.",
    "{A} and {B} could not agree about the {weather}, so they asked the {animal}.",
    "The {animal} had no opinion.",
    "\"What a day,\" said {A}, and {B} had to agree.",
    "{B} climbed a hill to see how far they had come.",
    "From there the town looked as small as a hand.",
    "They crossed the river in a boat that was much too small.",
    "\"Can you swim?\" asked {A}. \"Ask me later,\" said {B}.",
    "At the inn the soup was cold, but the beds were warm.",
    "{A} slept badly because a {animal} sang all night.",
    "Early in the morning they were on the road again.",
    "The children of the next town followed them and asked for {things}.",
    "{A} showed them a trick with two {things} and a hat.",
    "\"That is how my mother did it,\" said {A}.",
    "There was a smell of {weather} and of fresh bread.",
    "A man with a cart full of {things} let them ride with him.",
    "He talked about his {animal} the whole way.",
    "{A} felt too {feeling} to listen.",
    "By the time they came back, the {season} fair had begun.",
    "There was music, and {A} danced with {B} until midnight.",
    "\"You dance like a {animal},\" said {B}. \"Thank you,\" said {A}.",
    "Somewhere a door closed, and a {animal} began to cry.",
    "{A} listened, but it was only the wind.",
    "The days grew short, and the {things} fell from the trees.",
]
MUSINGS = [
    "\"I keep thinking of the {obj},\" said {A}.",
    "\"Do not forget the {obj},\" said {A}.",
    "{A} thought of the {obj} and felt {feeling}.",
    "\"Nobody must know about the {obj},\" said {B}.",
]
ENDINGS = [
    "And so the {season} ended, and everybody went home {feeling}.",
    "After that day they were never {feeling} again.",
    "And if the {weather} has not stopped, they are still sitting there.",
    "That night they all slept well, even the {animal}.",
    "The {animal} saw it all, and it never told anybody.",
    "They promised to meet again in {season}, and they did.",
]


@dataclass
class Question:
    """One question; `at` is where its answer stands in the story (a character offset),
    `known` how many characters of the answer only repeat the question."""

    kind: str
    question: str
    answer: str
    at: int
    known: int


@dataclass
class Story:
    text: str
    questions: list[Question] = field(default_factory=list)
    # Where the tale itself repeats an earlier fact ("Ben found the red key under the ..."):
    # character ranges that can be predicted from what came before.
    recalls: list[tuple[int, int]] = field(default_factory=list)


class _Teller:
    """Collects the text of one story and remembers where each fact was last told."""

    def __init__(self, rng: random.Random, chars: list[str]):
        self.rng, self.chars = rng, chars
        self.parts: list[str] = []
        self.length = 0
        self.new_paragraph = True

    def say(self, sentence: str) -> int:
        """Appends a sentence and returns its character offset in the story."""
        sep = "" if self.new_paragraph else " "
        self.new_paragraph = False
        at = self.length + len(sep)
        self.parts.append(sep + sentence)
        self.length = at + len(sentence)
        return at

    def paragraph(self) -> None:
        if not self.new_paragraph:
            self.parts.append("\n")
            self.length += 1
            self.new_paragraph = True

    def fill(self, template: str, obj: str = "") -> int:
        rng = self.rng
        a, b = rng.sample(self.chars, 2)
        x, y = rng.sample(ANIMALS, 2)
        t = rng.choice(THINGS)
        return self.say(template.format(
            A=a, B=b, obj=obj, animal=x, animal2=y, things=t,
            things0=rng.choice(["apples", "nuts", "bread and cheese"]),
            weather=rng.choice(WEATHER), season=rng.choice(SEASONS),
            feeling=rng.choice(FEELINGS),
            n={2: "two", 3: "three", 4: "four"}[len(self.chars)]))


def tell(rng: random.Random, size: float) -> Story:
    """Draws a story.  `size` in 0..1 goes from a sketch of ~100 tokens to a full tale.

    A negative size gives a drill: a few bare facts, no tale around them.  A model that
    has not yet discovered how to look things up discovers it there first.
    """
    drill, size = size < 0, max(size, 0.0)
    n_chars = rng.randint(2 + (size > 0.6), 2 + round(2 * size))
    n_objs = rng.randint(2, 4) if drill else rng.randint(2 + (size > 0.6), 2 + round(3 * size))
    chars = rng.sample(NAMES, n_chars)
    # Nouns differ within a story; adjectives and places may be shared between objects.
    objs = [f"{rng.choice(OBJECT_ADJ)} {n}" for n in rng.sample(OBJECT_NOUN, n_objs)]
    t = _Teller(rng, chars)
    questions: list[Question] = []
    recalls: list[tuple[int, int]] = []
    # Decks rather than dice: no event and no turn of phrase comes twice in a tale.
    fillers = iter(rng.sample(FILLERS, len(FILLERS)))
    bridges = itertools.chain(rng.sample(BRIDGES, len(BRIDGES)), itertools.repeat(BRIDGES[0]))

    if rng.random() < 0.6 and not drill:
        t.say(f"Title: {chars[0]} and the {objs[0]}")
        t.paragraph()
    if not drill:
        t.fill(rng.choice(OPENINGS))

    # --- the facts, as a list of scenes that are told in order -------------------------
    jobs, towns = rng.sample(JOBS, n_chars), rng.sample(TOWNS, n_chars)
    dishes = rng.sample(DISHES, n_chars)

    def introduce(i: int) -> None:
        c = chars[i]
        text = f"{c} was a {jobs[i]} from {towns[i]}."
        at = t.say(text)
        questions.append(Question("who_is", f"Who was {c}?", f"{c} was a {jobs[i]} from {towns[i]}.",
                                  at + text.index("a " + jobs[i]), len(c) + 5))
        if rng.random() < 0.5:
            text = f"{c} loved {dishes[i]}."
            at = t.say(text)
            questions.append(Question("loves", f"What did {c} love?", f"{c} loved {dishes[i]}.",
                                      at + text.index(dishes[i]), len(c) + 7))

    def magic() -> None:
        a, b, c = rng.sample(MAGIC, 3)
        text = f"\"The magic words were {a}, {b} and {c},\" said {rng.choice(chars)}."
        at = t.say(text)
        questions.append(Question("magic", "What were the magic words?",
                                  f"The magic words were {a}, {b} and {c}.",
                                  at + text.index("were ") + 5, 21))

    places: set[str] = set()

    def new_place() -> str:
        while True:
            prep, noun = rng.choice(PLACES)
            place = f"{prep} the {rng.choice(PLACE_ADJ)} {noun}"
            if noun not in places:
                places.add(noun)
                return place

    state: dict[str, tuple[str, str, int]] = {}     # object -> (kind, answer, offset)
    holder: dict[str, str] = {}
    place_of: dict[str, str] = {}
    hider: dict[str, str] = {}
    told: dict[str, int] = {o: 0 for o in objs}

    def move(o: str) -> None:
        """Tells a (new) state of object `o`."""
        moved = "_moved" if told[o] else ""
        told[o] += 1
        if o in holder:
            actor = holder.pop(o)
        else:
            actor = rng.choice([c for c in chars if c != hider.get(o)])
            if o in place_of:
                text = f"{actor} found the {o} {place_of[o]}."
                at = t.say(text) + text.index(place_of[o])
                recalls.append((at, at + len(place_of.pop(o)) + 1))
        if rng.random() < 0.5:
            place = new_place()
            text = f"{actor} {rng.choice(['hid', 'put', 'left'])} the {o} {place}."
            at = t.say(text) + text.index(place)
            hider[o] = actor
            place_of[o], state[o] = place, ("where" + moved, f"Look for the {o} {place}.", at)
        else:
            to = rng.choice([c for c in chars if c != actor])
            text = f"{actor} {rng.choice(['gave', 'handed', 'passed'])} the {o} to {to}."
            at = t.say(text) + text.index(f"to {to}.")
            holder[o], state[o] = to, ("who_has" + moved, f"They gave the {o} to {to}.", at)

    scenes = [lambda i=i: introduce(i) for i in range(n_chars)]
    if rng.random() < 0.6:
        scenes.insert(rng.randint(1, len(scenes)), magic)
    # Characters come first; the order of the objects' scenes is free.
    moves = [o for o in objs] + [o for o in objs if rng.random() < 0.4]
    rng.shuffle(moves)
    scenes += [lambda o=o: move(o) for o in moves]

    gap = 0.0 if drill else 0.15 + 0.45 * size                # how often something else happens in between
    for k, scene in enumerate(scenes):
        if k and rng.random() < 0.35 and not drill:
            t.paragraph()
            t.fill(next(bridges))
        scene()
        if rng.random() < gap:
            t.fill(next(fillers))

    # --- a long way to go before the questions -----------------------------------------
    more = 0 if drill else rng.randint(round(14 * size * size), round(4 + 18 * size))
    for k in range(more):
        if k % 5 == 0:
            t.paragraph()
            t.fill(next(bridges))
        if rng.random() < 0.1:
            t.fill(rng.choice(MUSINGS), obj=rng.choice(objs))
        else:
            t.fill(next(fillers))
    if not drill:
        t.fill(rng.choice(ENDINGS))
        t.paragraph()
        t.say("The end.")

    for o, (kind, answer, at) in state.items():
        q = f"Where is the {o}?" if kind.startswith("where") else f"Who has the {o}?"
        known = answer.index(o) + len(o) + 1
        questions.append(Question(kind, q, answer, at, known))
    rng.shuffle(questions)
    return Story("".join(t.parts), questions, recalls)


if __name__ == "__main__":
    for s in (0.0, 1.0):
        story = tell(random.Random(1), s)
        print(story.text)
        for q in story.questions:
            print(f"Question: {q.question}\nAnswer: {q.answer}   [{q.kind}, {story.text[q.at:q.at + 12]!r}, {q.answer[q.known:]!r}]")
        print()
