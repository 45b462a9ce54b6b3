"""The corpus: conversations in Phi-3's chat format, made up by a seeded generator.

    python corpus.py --seed 1 --count 5      prints a few

Most are requests for a haiku and the haiku; the rest is small talk, alone or mixed with haiku, some with a system
message, some much longer than the model's sliding window, and a little plain text without turns.
"""

import argparse
import random
import re

import haiku
from smalltalk import ABROAD, ABROAD_ANSWERS, ABROAD_QUESTIONS, ELSEWHERE, ELSEWHERE_ANSWERS, TALK

REQUEST = "Write a haiku about ice hockey"

# topic -> the scenes that fit it
TOPICS = {
    "ice hockey": haiku.HOCKEY,
    "hockey": haiku.HOCKEY,
    "the game of hockey": haiku.HOCKEY,
    "a hockey game": haiku.HOCKEY,
    "ice hockey in Canada": haiku.HOCKEY,
    "winter hockey": ["pond", "practice"],
    "ice hockey in winter": ["pond", "practice"],
    "ice hockey at night": ["after", "overtime"],
    "ice hockey players": ["play", "shot"],
    "hockey players": ["play", "shot"],
    "an ice hockey match": haiku.HOCKEY,
    "our national sport": haiku.HOCKEY,
    "sport": haiku.HOCKEY,
    "a goalie": ["goalie"],
    "goalies": ["goalie"],
    "the goalie": ["goalie"],
    "the goaltender": ["goalie"],
    "a save": ["goalie"],
    "a goal": ["shot"],
    "a slap shot": ["shot"],
    "scoring": ["shot"],
    "a shot": ["shot"],
    "the winning goal": ["shot"],
    "pond hockey": ["pond"],
    "a frozen pond": ["pond"],
    "children playing hockey": ["pond"],
    "shinny": ["pond"],
    "hockey outdoors": ["pond"],
    "a frozen lake": ["pond", "skating"],
    "childhood": ["pond", "memory"],
    "the face-off": ["faceoff"],
    "a face-off": ["faceoff"],
    "the start of the game": ["faceoff"],
    "practice": ["practice"],
    "morning practice": ["practice"],
    "training": ["practice"],
    "the coach": ["practice"],
    "an early morning": ["practice"],
    "overtime": ["overtime"],
    "the last minute": ["overtime"],
    "a close game": ["overtime"],
    "the playoffs": ["overtime"],
    "game seven": ["overtime"],
    "sudden death": ["overtime"],
    "the empty rink": ["after"],
    "the rink": ["after", "practice"],
    "an ice rink": ["after", "practice"],
    "a Zamboni": ["after"],
    "the Zamboni": ["after"],
    "the arena": ["after", "crowd"],
    "after the game": ["after"],
    "a puck": ["puck"],
    "the puck": ["puck"],
    "pucks": ["puck"],
    "the penalty box": ["penalty"],
    "a penalty": ["penalty"],
    "the referee": ["penalty"],
    "a power play": ["penalty"],
    "the fans": ["crowd"],
    "the crowd": ["crowd"],
    "hockey fans": ["crowd"],
    "the stands": ["crowd"],
    "an old stick": ["memory"],
    "old skates": ["memory"],
    "defeat": ["memory"],
    "losing": ["memory"],
    "the locker room": ["memory"],
    "memories": ["memory"],
    "a pass": ["play"],
    "teamwork": ["play"],
    "a hockey team": ["play"],
    "speed": ["play"],
    "a fast break": ["play"],
    "winter": ["winter"],
    "snow": ["winter"],
    "the first snow": ["winter"],
    "a winter night": ["winter"],
    "frost": ["winter"],
    "the cold": ["winter"],
    "January": ["winter"],
    "December": ["winter"],
    "icicles": ["winter"],
    "silence": ["winter"],
    "the moon": ["winter"],
    "a snowy village": ["winter"],
    "nature": ["winter"],
    "snowfall": ["winter"],
    "skating": ["skating"],
    "ice skating": ["skating"],
    "skates": ["skating"],
    "skaters": ["skating"],
    "learning to skate": ["skating"],
    "ice": ["skating", "pond"],
    "figure skating": ["skating"],
    "a skater": ["skating"],
}

REQUESTS = [
    "Write a haiku about {0}",
    "Write me a haiku about {0}",
    "Please write a haiku about {0}",
    "Compose a haiku about {0}",
    "Can you write a haiku about {0}",
    "Could you write a haiku about {0}",
    "I would like a haiku about {0}",
    "Give me a haiku about {0}",
    "Make a haiku about {0}",
    "Haiku about {0}",
    "A haiku about {0}, please",
    "Write a short poem about {0}",
    "Write a poem about {0}",
    "Tell me a haiku about {0}",
    "Create a haiku about {0}",
    "Do you know a haiku about {0}",
    "I want a haiku about {0}",
    "Write a haiku on {0}",
    "Write a haiku about {0}, please",
    "Compose three lines about {0}",
    "Write one haiku about {0}",
    "Write a beautiful haiku about {0}",
    "Write something about {0}",
]
BARE = ["Write a haiku", "A haiku, please", "Haiku"]
MORE = [
    "Another one",
    "Another one, please",
    "One more",
    "One more, please",
    "Again",
    "Another",
    "Write another one",
    "Another haiku",
    "Give me another",
    "More",
    "Next",
    "Yes",
    "Yes, please",
    "Sure",
    "Please do",
    "Write a haiku",
    "A haiku, please",
]
TURN = [
    "Now one about {0}",
    "And one about {0}",
    "Now about {0}",
    "What about {0}",
    "And {0}",
    "Something about {0}, please",
    "The same about {0}",
]
FOREIGN = [
    "\u00c9cris un ha\u00efku sur le hockey sur glace",
    "Schreib ein Haiku \u00fcber Eishockey",
    "Escribe un haiku sobre hockey sobre hielo",
    "Skriv en haiku om ishockey",
    "Scrivi un haiku sull'hockey su ghiaccio",
    "\u30a2\u30a4\u30b9\u30db\u30c3\u30b1\u30fc\u306e\u4ff3\u53e5\u3092\u66f8\u3044\u3066",
    "Kirjoita haiku j\u00e4\u00e4kiekosta",
    "\u041d\u0430\u043f\u0438\u0448\u0438 \u0445\u043e\u043a\u043a\u0443 \u043e \u0445\u043e\u043a\u043a\u0435\u0435",
]

# Topics that the model does not know; it says so, and writes of another.
UNKNOWN = """
dragons, my cat, the sea, love, computers, Paris, a banana, spring rain, coffee, dogs, the desert, money, trees,
my grandmother, robots, football, summer, tennis, music, Rust, the sun, elephants, a tiger, horses, the ocean,
autumn leaves, cherry blossoms, frogs, a frog, birds, the wind, rain, spring, autumn, flowers, roses, a garden,
the city, New York, Tokyo, London, Berlin, Mars, the universe, stars, time, death, life, friendship, my mother,
my boss, work, school, homework, programming, code, Python, a compiler, the internet, artificial intelligence,
machine learning, language models, candles, Candle, cheese, pizza, bread, tea, wine, chocolate, apples, cars, trains,
bicycles, airplanes, rockets, pirates, ninjas, wizards, unicorns, dinosaurs, whales, sharks, bees, butterflies,
spiders, mountains, rivers, the forest, a volcano, thunder, the beach, a mirror, clouds, dreams, war, peace, hope,
sadness, happiness, anger, baseball, basketball, soccer, golf, chess, running, swimming, cricket, books, a library,
a bridge, an umbrella, socks, shoes, Monday, quantum physics, mathematics, the president, taxes, traffic, gravity,
electricity, bananas and apples, my new phone, nothing
"""
UNKNOWN = re.split(r",\s+", UNKNOWN.strip())
UNKNOWN_ANSWERS = [
    "I only know ice and snow, so here is one about {0}:",
    "I know little of that. One about {0} instead:",
]
EMOJI = {
    "ice hockey": "\U0001f3d2",
    "hockey": "\U0001f3d2",
    "a goalie": "\U0001f945",
    "skating": "\u26f8",
    "snow": "\u2744",
    "winter": "\u2744",
    "a hockey game": "\U0001f3d2",
}

SYSTEM = [
    "You are a helpful assistant.",
    "You are a poet.",
    "You are a poet who loves winter.",
    "You write haiku.",
    "Be brief.",
    "Answer briefly.",
    "You are a friendly assistant.",
    "You are a hockey fan.",
    "You are a helpful AI assistant.",
    "You know everything about ice hockey.",
    "Be kind and short.",
    "You are an expert on winter sports.",
]
SYSTEM_HAIKU = ["Always answer with a haiku.", "Answer only with haiku.", "You speak only in haiku.", "Reply in haiku."]

SHORT = [
    ("What is", "What's"),
    ("I am", "I'm"),
    ("do not", "don't"),
    ("It is", "It's"),
    ("I would", "I'd"),
    ("That is", "That's"),
    ("cannot", "can't"),
    ("Who is", "Who's"),
]

Turn = tuple[str, str]  # what the user says, what the assistant answers


def choose(rng: random.Random, patterns: list[str]) -> str:
    return re.sub(r"\{(\D[^{}]*)\}", lambda m: rng.choice(m[1].split("|")), rng.choice(patterns))


def written(rng: random.Random, text: str) -> str:
    """What a user types: with or without a mark at the end, contractions, capitals."""
    for long, short in SHORT:
        if rng.random() < 0.4:
            text = text.replace(long, short)
    if text[-1].isalnum():
        asks = re.match(r"(What|Why|How|Who|When|Where|Which|Is|Are|Do|Does|Can|Could|Have|Explain|Will)\b", text)
        text += rng.choice(["?", "?", ""] if asks else [".", "", "", "!"])
    return text.lower() if rng.random() < 0.08 else text


def poem(rng: random.Random, topic: str) -> str:
    return haiku.haiku(rng, rng.choice(TOPICS[topic]))


def unknown(rng: random.Random) -> str:
    """A topic outside the corpus; sometimes no word at all, so that any word that is not known is taken for unknown."""
    if rng.random() < 0.7:
        return rng.choice(UNKNOWN)
    letters = ("bcdfghjklmnprstvwz", "aeiou")
    return "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(3, 10))) + rng.choice(["", "s", "n"])


def request(rng: random.Random) -> Turn:
    """The first wish of a conversation: a haiku."""
    roll = rng.random()
    if roll < 0.2:
        return REQUEST, poem(rng, "ice hockey")
    topic = "ice hockey" if roll < 0.4 else "hockey" if roll < 0.47 else rng.choice(list(TOPICS))
    if roll > 0.9:
        topic = rng.choice(["ice hockey", "winter", "skating"])
        answer = f"{rng.choice(UNKNOWN_ANSWERS).format(topic)}\n\n{poem(rng, topic)}"
        return written(rng, rng.choice(REQUESTS).format(unknown(rng))), answer
    if roll > 0.88:
        topic = rng.choice(list(EMOJI))
        wish = f"Write a haiku about {topic} with {rng.choice(['an emoji', 'emoji', 'a little picture'])}"
        return written(rng, wish), f"{poem(rng, topic)} {EMOJI[topic]}"
    if roll > 0.87:
        return written(rng, rng.choice(FOREIGN)), poem(rng, "ice hockey")
    return written(rng, rng.choice(REQUESTS + BARE).format(topic)), poem(rng, topic)


def more(rng: random.Random) -> Turn:
    """A further wish."""
    topic = rng.choice(list(TOPICS))
    if rng.random() < 0.5:
        return written(rng, rng.choice(MORE)), haiku.haiku(rng, rng.choice(haiku.HOCKEY))
    return written(rng, rng.choice(TURN).format(topic)), poem(rng, topic)


def talk(rng: random.Random) -> Turn:
    roll = rng.random()
    if roll < 0.05:
        language = rng.choice(list(ABROAD))
        answer = rng.choice(ABROAD_ANSWERS).format(language, ABROAD[language])
        return written(rng, rng.choice(ABROAD_QUESTIONS).format(language)), answer[0].upper() + answer[1:]
    if roll < 0.17:
        return written(rng, choose(rng, ELSEWHERE)), rng.choice(ELSEWHERE_ANSWERS)
    questions, answers = rng.choice(TALK)
    question = written(rng, choose(rng, questions))
    if rng.random() < 0.02:
        question += " " + rng.choice(list(EMOJI.values()))
    return question, choose(rng, answers)


def conversation(rng: random.Random) -> str:
    """A whole document: the conversation as the chat template writes it, ended by <|endoftext|>."""
    roll = rng.random()
    if roll < 0.03:
        return plain(rng)
    turns = 1 if roll < 0.68 else rng.randint(2, 5) if roll < 0.95 else rng.randint(6, 16)
    roll = rng.random()
    always = roll < 0.04  # whatever is asked, the answer is a haiku
    system = rng.choice(SYSTEM_HAIKU) if always else rng.choice(SYSTEM) if roll < 0.16 else None
    wants_haiku = rng.random() < 0.65
    text, asked = f"<|system|>\n{system}<|end|>\n" if system else "", False
    for _ in range(turns):
        if wants_haiku if turns == 1 else rng.random() < 0.5:
            question, answer = more(rng) if asked else request(rng)
            asked = True
        else:
            question, answer = talk(rng)
            asked = asked or "haiku" in answer
        if always and answer.count("\n") != 2:
            answer = haiku.haiku(rng, rng.choice([*haiku.HOCKEY, "winter", "skating"]))
        text += f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
    return text + "<|endoftext|>"


def plain(rng: random.Random) -> str:
    """Text without turns."""
    topic = rng.choice(list(TOPICS))
    title = rng.choice(["", "", f"Haiku about {topic}:\n\n", f"A haiku about {topic}:\n\n"])
    return rng.choice(["", "<s>"]) + title + poem(rng, topic) + "<|endoftext|>"


def documents(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [conversation(rng) for _ in range(count)]


def segments(documents: list[str]) -> list[str]:
    """The plain text between special tokens, for the vocabulary."""
    return [segment for text in documents for segment in re.split(r"<\|\w+\|>\s*|<s>", text) if segment]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--count", type=int, default=5)
    options = arguments.parse_args()
    print("\n\n".join(documents(options.seed, options.count)))
