"""RULER's tasks over our prose, seeded: prompts for evaluation, packed token sequences for training.

The wording follows RULER (arXiv 2404.06654). A sample is (prompt, answers): the model continues the prompt, and every answer
must be a substring of what it writes. Training sequences ask several questions about one haystack, because each question
costs thirty tokens and the haystack costs thousands.
"""

import pathlib
import random
import re

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASKS = {
    # name: (haystack, key kind, value kind, needle keys, values per key, keys asked)
    "niah_single_1": ("noise", "pair", "number", 1, 1, 1),
    "niah_single_2": ("essay", "pair", "number", 1, 1, 1),
    "niah_single_3": ("essay", "pair", "uuid", 1, 1, 1),
    "niah_multikey_1": ("essay", "pair", "number", 4, 1, 1),
    "niah_multikey_2": ("needle", "pair", "number", 0, 1, 1),
    "niah_multikey_3": ("needle", "uuid", "uuid", 0, 1, 1),
    "niah_multivalue": ("essay", "pair", "number", 1, 4, 1),
    "niah_multiquery": ("essay", "pair", "number", 4, 1, 4),
}
EVAL_TASKS = [*TASKS, "vt"]


def listing(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class Source:
    """Sentences and words of one split. Words are split by hash, so evaluation keys were never trained on."""

    def __init__(self, corpus, split):
        corpus = pathlib.Path(corpus)
        name = {"train": "train.txt", "heldout": "heldout.txt"}[split]
        text = (corpus / name).read_text().replace("\n", " ")
        self.sentences = [s for s in re.split(r"(?<=[.?!])\s+", text) if s]
        words = (corpus / "words.txt").read_text().split()
        heldout = lambda w: sum(map(ord, w)) % 10 == 0
        self.words = [w for w in words if heldout(w) == (split == "heldout")]


class Generator:
    def __init__(self, source, seed, hard=0.0, counting=0.0):
        """Shares of training samples. hard: several answers per question, or variable chains; counting: frequent words."""
        self.source, self.hard, self.counting = source, hard, counting
        self.rng = random.Random(seed)

    # ---- keys and values
    def key(self, kind):
        word = lambda: self.rng.choice(self.source.words)
        if kind == "pair":
            return word() + "-" + word()
        if kind == "two":
            return word() + " " + word()
        if kind == "word":
            return word()
        return self.uuid()

    def uuid(self):
        text = f"{self.rng.getrandbits(128):032x}"
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    def value(self, kind):
        if kind == "number":
            return str(self.rng.randint(1000000, 9999999))
        if kind == "uuid":
            return self.uuid()
        return self.key("pair" if self.rng.random() < 0.5 else "word")

    def distinct_keys(self, count, kind):
        keys = {}
        while len(keys) < count:
            keys[self.key(kind)] = None
        return list(keys)

    # ---- haystacks: a list of sentences and what joins them
    def haystack(self, kind, characters, filler):
        if kind == "noise":
            return [NOISE] * max(1, characters // (len(NOISE) + 1)), "\n"
        if kind == "needle":
            lines, total = [], 0
            while total < characters:
                lines.append(filler())
                total += len(lines[-1]) + 1
            return lines, "\n"
        sentences, total = [], 0
        at = self.rng.randrange(len(self.source.sentences))
        while total < characters:
            sentence = self.source.sentences[at % len(self.source.sentences)]
            sentences.append(sentence)
            total += len(sentence) + 1
            at += 1
        return sentences, " "

    def insert(self, sentences, needles, depths=None):
        """Inserts each needle before a random sentence (or at its depth, 0..1)."""
        spots = [int((d if d is not None else self.rng.random()) * (len(sentences) + 1)) for d in depths or [None] * len(needles)]
        for spot, needle in sorted(zip(spots, needles), key=lambda pair: -pair[0]):
            sentences.insert(min(spot, len(sentences)), needle)
        return sentences

    # ---- wording
    @staticmethod
    def needle(kind, key, value):
        return f"One of the special magic {kind}s for {key} is: {value}."

    @staticmethod
    def intro(kind, plural):
        if plural:
            return (f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
                    f"I will quiz you about the {kind}s afterwards.\n")
        return (f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {kind} afterwards.\n")

    @staticmethod
    def question(kind, keys, plural):
        if plural:
            return f"What are all the special magic {kind}s for {listing(keys)} mentioned in the provided text?"
        return f"What is the special magic {kind} for {keys[0]} mentioned in the provided text?"

    @staticmethod
    def lead(kind, keys, plural):
        if plural:
            return f" The special magic {kind}s for {listing(keys)} mentioned in the provided text are"
        return f" The special magic {kind} for {keys[0]} mentioned in the provided text is"

    # ---- evaluation
    def sample(self, task, characters):
        """One prompt of about `characters` characters -> (prompt, [answers])."""
        if task == "vt":
            return self.variable_tracking(characters)
        haystack, key_kind, kind, num_keys, num_values, num_asked = TASKS[task]
        filler = lambda: self.needle(kind, self.key(key_kind), self.value(kind))
        sentences, joint = self.haystack(haystack, characters, filler)
        keys = self.distinct_keys(max(num_keys, 1), key_kind)
        table = {key: [self.value(kind) for _ in range(num_values)] for key in keys}
        needles = [self.needle(kind, k, v) for k, values in table.items() for v in values]
        self.rng.shuffle(needles)
        # The task's own depth rule: forty equally spaced places.
        depths = [self.rng.randrange(41) / 40 for _ in needles]
        asked = self.rng.sample(keys, num_asked)
        plural = num_values * num_asked > 1
        prompt = (self.intro(kind, plural) + joint.join(self.insert(sentences, needles, depths)) + "\n"
                  + self.question(kind, asked, plural) + self.lead(kind, asked, plural))
        return prompt, [v for k in asked for v in table[k]]

    def chain_problem(self, characters, letters, hops=4):
        """A chain of assignments in noise, up to where the answer begins, and its variables."""
        names = {}
        while len(names) <= hops:
            names["".join(self.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))] = None
        names = list(names)
        value = str(self.rng.randrange(10000, 99999))
        # The blank behind an assignment of a variable is RULER's, as is the one behind "they are:".
        lines = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:])]
        sentences, joint = self.haystack("noise", characters, None)
        spots = sorted(self.rng.randrange(len(sentences)) for _ in lines)
        for spot, line in reversed(list(zip(spots, lines))):
            sentences.insert(spot, line)
        prompt = ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
                  + joint.join(sentences)
                  + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
                  f"According to the chain(s) of variable assignment in the text above, {hops + 1} variables are "
                  f"assigned the value {value}, they are: ")
        return prompt, names

    def variable_tracking(self, characters):
        """A worked example with names of three letters, of about 500 tokens where there is room, then the problem."""
        example_characters = min(1500, characters // 4)
        example, names = self.chain_problem(example_characters, 3)
        prompt, asked = self.chain_problem(characters - example_characters, 5)
        return f"{example} {' '.join(names)}\n\n{prompt}", asked

    def common_words(self, characters):
        """A numbered list in which ten words stand more often than the others -> (prompt, the ten)."""
        repeats, others, entry_characters = (30, 3, 12) if characters > 6000 else (6, 1, 12)
        while 10 * repeats * entry_characters > 0.7 * characters and repeats > 2:
            repeats, others = repeats * 2 // 3, 1
        num_others = max(1, (characters - 10 * repeats * entry_characters) // (entry_characters * others))
        words = self.rng.sample(self.source.words, 10 + min(num_others, len(self.source.words) - 10))
        listed = words[:10] * repeats + words[10:] * others
        self.rng.shuffle(listed)
        prompt = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
                  "appear most often.\n" + numbered(listed)
                  + "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
                  "often in the list are:")
        return prompt, words[:10]

    def coded_words(self, characters):
        """Coded words, the word of rank k = 2, 3, .. in proportion to 1 / k^2; the first rank is dots -> (prompt, the first three)."""
        units, words = characters // 7, {}
        while len(words) < max(5, characters // 150):
            words["".join(self.rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))] = None
        ranked = ["...", *words]
        coded = [w for k, w in enumerate(ranked, 1) for _ in range(int(units / k**2 / 1.645))]
        self.rng.shuffle(coded)
        prompt = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently "
                  "appeared coded words. " + " ".join(coded)
                  + "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
                  "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
                  "appeared words are:")
        return prompt, ranked[1:4]

    # ---- training
    def counting_sample(self, characters):
        if self.rng.random() < 0.5:
            prompt, words = self.coded_words(int(0.55 * characters))
            answer = " " + " ".join(words)
        else:
            example_characters = 1500 if characters > 6000 and self.rng.random() < 0.7 else 0
            prompt, words = self.common_words(int(0.75 * characters) - example_characters)
            answer = " " + numbered(words)
            if example_characters:
                example, found = self.common_words(example_characters)
                prompt = f"{example} {numbered(found)}\n{prompt}"
        at = prompt.rindex("Question:")
        return prompt[:at], [(prompt[at:], answer)]

    def training_sample(self, characters, num_questions):
        """One haystack, many questions -> (context, [(question, answer)])."""
        rng = self.rng
        if rng.random() < self.counting:
            return self.counting_sample(characters)
        if rng.random() < self.hard / 3:
            prompt, names = self.variable_tracking(characters)
            at = prompt.rindex("Question:")
            return prompt[:at], [(prompt[at:], " " + " ".join(names))]
        haystack = rng.choices(["essay", "needle", "noise"], [0.6, 0.25, 0.15])[0]
        key_kind = rng.choices(["pair", "word", "two", "uuid"], [0.55, 0.15, 0.15, 0.15])[0]
        kind = rng.choices(["number", "word", "uuid"], [0.6, 0.15, 0.25])[0]
        values_per_key = 4 if rng.random() < self.hard / 2 else 1
        keys = self.distinct_keys(num_questions + rng.randrange(3), key_kind)
        table = {key: [self.value(kind) for _ in range(values_per_key)] for key in keys}
        needles = [self.needle(kind, k, v) for k, values in table.items() for v in values]
        filler = lambda: self.needle(kind, self.key(key_kind), self.value(kind))
        budget = max(60, characters - sum(map(len, needles)))
        sentences, joint = self.haystack(haystack, budget, filler)
        # Needles must be shuffled together with their spots: `insert` keeps equal spots in order.
        sentences = self.insert(sentences, rng.sample(needles, len(needles)))
        order = {needle: place for place, needle in enumerate(sentences)}
        text = joint.join(sentences) + "\n"
        turns, asked = [], rng.sample(keys, num_questions)
        while asked:
            count = min(len(asked), rng.choice([2, 3, 4]) if rng.random() < self.hard and values_per_key == 1 else 1)
            group, asked = asked[:count], asked[count:]
            plural = count * values_per_key > 1
            found = [v for k in group for v in sorted(table[k], key=lambda v: order[self.needle(kind, k, v)])]
            lead = self.lead(kind, group, plural)
            style = rng.random()
            if style < 0.8:
                prompt = self.question(kind, group, plural) + lead
            elif style < 0.9:
                prompt = self.question(kind, group, plural) + "\n" + lead[1:]
            else:
                prompt = lead[1:]
            turns.append((prompt, " " + listing(found) + "."))
        plural = len(turns) > 1 or values_per_key > 1
        return (self.intro(kind, plural) if rng.random() < 0.9 else "") + text, turns


def encode_training(tokenizer, sample, bos, eos):
    """-> ids and, per token, what it is: 0 context, 1 question, 2 answer (the loss predicts class 2)."""
    context, turns = sample
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    ids = [bos] + plain(context)
    kinds = [0] * len(ids)
    for question, answer in turns:
        asked, answered = plain(question), plain(answer) + [eos]
        ids += asked + answered
        kinds += [1] * len(asked) + [2] * len(answered)
    return ids, kinds
